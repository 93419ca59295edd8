"""How long to wait before replacing what keeps failing: 1, 2, 4 … 60 s. Pure.

Nothing is counted in memory. The records of failed replicas stay in the registry for a while, and
the pause follows from them, so a new leader is exactly as patient as the old one was, and an
operator can read the cause beside the count. Replicas that fail together (a host dies under
twenty of them) are one failure: a round lasts from its first failure until its pause is over.
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from shared.models.replica import Replica, ReplicaState

FIRST_PAUSE_MS: Final = 1_000
LONGEST_PAUSE_MS: Final = 60_000
STABLE_MS: Final = 300_000
"""A replica that lived this long was no crash loop; READY for this long ends one."""
ROUNDS_KEPT: Final = 8
"""Enough rounds to reach the longest pause; older ones say nothing new."""


class Backoff(msgspec.Struct, frozen=True, kw_only=True):
    """What the kept failures of one revision amount to."""

    rounds: int = 0
    """Failures in a row, those that happened together counted once."""
    next_try_ms: int = 0
    """Redis time before which no replacement is made."""
    evidence: tuple[str, ...] = ()
    """Replica ids of the failed records that the count rests on: the first of each round."""
    last_reason: str = ""


def pause_ms(rounds: int) -> int:
    """Give the pause after `rounds` failures in a row."""
    if rounds <= 0:
        return 0
    return min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS << min(rounds - 1, 16))


def assess(failed: Iterable[Replica]) -> Backoff:
    """Derive the backoff from the FAILED records of one revision."""
    rounds: list[Replica] = []
    until_ms = 0
    last = ""
    for replica in sorted(failed, key=_when):
        if replica.state is not ReplicaState.FAILED:
            continue
        last = replica.reason
        if rounds and replica.since_ms < until_ms:
            continue
        if replica.since_ms - replica.gen >= STABLE_MS:
            rounds.clear()
        rounds.append(replica)
        until_ms = replica.since_ms + pause_ms(len(rounds))
    return Backoff(
        rounds=len(rounds),
        next_try_ms=until_ms,
        evidence=tuple(replica.rid for replica in rounds[-ROUNDS_KEPT:]),
        last_reason=last,
    )


def _when(replica: Replica) -> tuple[int, str]:
    return replica.since_ms, replica.rid
