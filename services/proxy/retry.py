"""What to do when a replica did not answer a request: pure rules, time is an argument.

Failures before the first byte reached the client come here, and those of a replica that was to go
on with a stream. What may be sent again is what a replica certainly did not answer; an ordinary 4xx
is an answer. A request that was on a replica
when it died counts as one of its tries (it may be what kills replicas); one that never reached a
replica does not, and may wait as long as its deadline allows. Retries beyond the budget are
delayed, not refused: the budget keeps a sick fleet from being stormed, and loses nobody.
"""

from enum import Enum
from typing import Final, NamedTuple

ENGINE_DEAD: Final = b"EngineCore encountered an issue"
"""What vLLM answers (500, or as a stream's only event) when its engine process has died."""

BUDGET_RATIO: Final = 0.1
BUDGET_FLOOR: Final = 100.0
PAUSE_S: Final = 1.0
STALE_S: Final = 1.0
"""A reused connection that ends this soon without a byte was closed before the request came; one
that ends later carried the request to a replica that died of it, perhaps."""


class Failure(Enum):
    """How a try ended."""

    CONNECT = "connect"
    """No connection: the request never left."""
    RESET = "reset"
    """The connection ended before a complete first answer."""
    TIMEOUT = "timeout"
    """No first byte in time."""
    REJECTED = "rejected"
    """503 of the engine's queue: nothing was started."""
    GATEWAY = "gateway"
    """502 or 504 of something in front of the engine."""
    ENGINE_DEAD = "engine_dead"
    """The engine said that it is dead."""
    WITHDRAWN = "withdrawn"
    """The routing table says that the replica has ended."""
    SILENT = "silent"
    """Nothing more came in the middle of an answer."""


CONNECTION_LEVEL: Final = frozenset(
    {Failure.CONNECT, Failure.RESET, Failure.ENGINE_DEAD, Failure.SILENT}
)
"""Failures that speak against the replica; only these move its breaker."""

UNSENT: Final = frozenset({Failure.CONNECT, Failure.REJECTED})
"""Failures after which the replica certainly did no work for the request."""


class Verdict(Enum):
    """What to do next."""

    ELSEWHERE = "elsewhere"
    """Reserve another replica now, without the ones tried."""
    LATER = "later"
    """Wait until the table changes or a moment has passed, then try any replica."""
    GIVE_UP = "give_up"
    """Tell the client."""


class Situation(NamedTuple):
    """What the rules look at."""

    failure: Failure
    sent_tries: int
    """Tries that reached a replica, this one included."""
    others_ready: int
    """READY replicas that this request has not tried."""
    left_s: float
    """Seconds until this request's deadline for its first byte."""


def classify(status: int, body: bytes) -> Failure | None:
    """Tell how an upstream answer failed, or None where it is an answer for the client."""
    if status < 500:
        return None
    if status == 503:
        return Failure.REJECTED
    if status in {502, 504}:
        return Failure.GATEWAY
    if ENGINE_DEAD in body:
        return Failure.ENGINE_DEAD
    return None


def decide(situation: Situation, *, max_tries: int) -> Verdict:
    """Choose what happens to a request whose try has just failed."""
    if situation.left_s <= 0:
        return Verdict.GIVE_UP
    if situation.sent_tries >= max_tries:
        return Verdict.GIVE_UP
    if situation.others_ready > 0:
        return Verdict.ELSEWHERE
    if situation.failure in {Failure.REJECTED, Failure.TIMEOUT}:
        # Every replica there is has refused, or hung: the client learns it, and when to return.
        return Verdict.GIVE_UP
    return Verdict.LATER


class Budget:
    """Retries allowed: a floor, plus a share of the traffic, refilled as time passes.

    A token bucket: each request adds `ratio`, each second adds `floor / 10`, up to `floor` plus
    ten seconds' worth of traffic's share. `delay_s` says how long a retry has to wait.
    """

    __slots__ = ("_floor", "_last_s", "_most", "_ratio", "_tokens")

    def __init__(
        self, now_s: float, *, ratio: float = BUDGET_RATIO, floor: float = BUDGET_FLOOR
    ) -> None:
        self._ratio = ratio
        self._floor = floor
        self._most = 10 * floor
        self._tokens = floor
        self._last_s = now_s

    def request(self) -> None:
        """Count one request of ordinary traffic."""
        if self._tokens < self._most:
            self._tokens += self._ratio

    def delay_s(self, now_s: float) -> float:
        """Take one retry; return the seconds it must wait (0: go now)."""
        per_second = self._floor / 10
        refilled = self._tokens + (now_s - self._last_s) * per_second
        # Time refills up to the floor only; what traffic has earned above it is kept.
        self._tokens = max(self._tokens, min(refilled, self._floor))
        self._last_s = now_s
        self._tokens -= 1
        return 0.0 if self._tokens >= 0 else -self._tokens / per_second
