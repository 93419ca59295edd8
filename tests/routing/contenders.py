"""Who decides where a request goes: what is compared.

`choose` names a replica when a request arrives, `first` and `ended` tell of its first token and its
end. All that a real proxy could know is used, nothing else: own counts, a snapshot of the fleet
that is 100 ms old, or the ledger. Relative throughput is known to all that can use it, or to none.
"""

from collections.abc import Callable, Mapping
from random import Random
from typing import Final, Protocol

from services.proxy.cost import OutputEstimate, prompt_tokens
from services.proxy.policies.affinity import Affinity, Offer
from services.proxy.policies.digests import Prefix, prefix_of
from services.proxy.table import choose_least_own
from shared.models.replica import Replica as Record
from shared.models.replica import ReplicaState
from shared.registry.ledger import Adopt, Release, Reserve
from tests.routing.fleet import MODEL, Audience, Job, RealLedger, Timeline
from tests.routing.prompts import prompt_of
from tests.simulation.luahost import LuaHost

SNAPSHOT_S: Final = 0.1


class Setting:
    """What contenders are given."""

    def __init__(
        self,
        timeline: Timeline,
        host: LuaHost,
        capacities: Mapping[str, float],
        proxies: int,
        random: Random,
    ) -> None:
        self.timeline = timeline
        self.host = host
        self.capacities = capacities
        self.rids = sorted(capacities)
        self.proxies = proxies
        self.random = random

    def records(self) -> dict[str, Record]:
        """Give the replicas as a routing table has them."""
        return {
            rid: Record(
                rid=rid,
                model=MODEL,
                gen=1,
                state=ReplicaState.READY,
                host="h",
                revision="r",
                capacity=capacity,
                max_requests=1_000_000,
            )
            for rid, capacity in self.capacities.items()
        }


class Contender(Audience, Protocol):
    """One policy."""

    def choose(self, job: Job) -> str:
        """Name the replica for a request."""
        ...


Make = Callable[[Setting], Contender]


class Blind:
    """Knows nothing of load."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def choose(self, job: Job) -> str:  # noqa: ARG002 - blind
        """Draw a replica."""
        return self.setting.random.choice(self.setting.rids)

    def first(self, job: Job) -> None:
        """Ignore it."""

    def ended(self, job: Job) -> None:
        """Ignore it."""


class RoundRobin(Blind):
    """Each proxy takes one replica after the other, from a place of its own."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._next = [setting.random.randrange(len(setting.rids)) for _ in range(setting.proxies)]

    def choose(self, job: Job) -> str:
        """Take the next."""
        rids = self.setting.rids
        at = self._next[job.proxy] = (self._next[job.proxy] + 1) % len(rids)
        return rids[at]


class Counting(Blind):
    """Each proxy counts its own requests."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.own: list[dict[str, int]] = [{} for _ in range(setting.proxies)]
        self.records = setting.records()

    def choose(self, job: Job) -> str:
        """Choose by own counts."""
        rid = self.pick(job)
        own = self.own[job.proxy]
        own[rid] = own.get(rid, 0) + 1
        return rid

    def pick(self, job: Job) -> str:
        """Take the replica with the fewest, ties at random: what a proxy does without Redis."""
        return choose_least_own(self.records, self.own[job.proxy], (), self.setting.random)

    def ended(self, job: Job) -> None:
        """Count down."""
        self.own[job.proxy][job.rid] -= 1


class TwoChoices(Counting):
    """Each proxy draws two replicas and takes the one with fewer of its own requests."""

    def pick(self, job: Job) -> str:
        """Draw two."""
        own, capacities = self.own[job.proxy], self.setting.capacities
        pair = self.setting.random.sample(self.setting.rids, 2)
        return min(pair, key=lambda rid: own.get(rid, 0) / capacities[rid])


class Stale(Counting):
    """All proxies see the same counts of the whole fleet, up to 100 ms old."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._seen: dict[str, int] = {}
        self._seen_s = -SNAPSHOT_S

    def pick(self, job: Job) -> str:  # noqa: ARG002 - all see the same
        """Take the replica with the fewest requests by the last snapshot."""
        now_s = self.setting.timeline.now_s
        if now_s - self._seen_s >= SNAPSHOT_S:
            self._seen_s = now_s // SNAPSHOT_S * SNAPSHOT_S
            self._seen = {
                rid: sum(own.get(rid, 0) for own in self.own) for rid in self.setting.rids
            }
        return choose_least_own(self.records, self._seen, (), self.setting.random)


class Exact(Blind):
    """The ledger decides: real scripts, real costs, with or without affinity."""

    def __init__(
        self,
        setting: Setting,
        *,
        tokens: bool,
        affinity: Callable[[], Affinity] | None,
        absolute: int = 0,
        relative: float = 1.0,
    ) -> None:
        super().__init__(setting)
        weights = {
            rid: f"{round(1000 / capacity)} 1000000 0"
            for rid, capacity in setting.capacities.items()
        }
        fields = {
            "max_requests": "1000000",
            "affinity_absolute": str(absolute),
            "affinity_relative": str(relative),
        }
        self._ledger = RealLedger(setting.host, weights, fields)
        self._tokens = tokens
        self._affinities: list[Affinity] = []
        if affinity is not None:
            self._affinities = [affinity() for _ in range(setting.proxies)]
            for each in self._affinities:
                each.update(setting.capacities)
        self._outputs = [OutputEstimate() for _ in range(setting.proxies)]
        self._further: dict[int, int] = {}

    def choose(self, job: Job) -> str:
        """Reserve."""
        prompt = prompt_of(job.arrival)
        further = self._outputs[job.proxy].expect(None)
        prefix = Prefix((), 0)
        whole = prompt_tokens(prompt)
        offer = Offer(whole + further)
        if self._affinities:
            prefix = prefix_of(prompt)
            offer = self._affinities[job.proxy].offer(prefix, whole, further)
        if not self._tokens:
            # Counts do not say what a cache saves: affinity may put up with two requests more.
            offer = Offer(1, tuple((rid, 1) for rid, _ in offer.candidates))
        self._further[job.number] = further
        op = Reserve(
            str(job.number),
            offer.cost_tokens,
            self.setting.random.getrandbits(31),
            offer.candidates,
        )
        (rid,) = self._ledger.batch(f"p{job.proxy}", [op])
        assert isinstance(rid, str)
        if self._affinities:
            self._affinities[job.proxy].placed(prefix, rid)
        return rid

    def first(self, job: Job) -> None:
        """Settle: the prompt has been worked off."""
        further = self._further.pop(job.number)
        if self._tokens:
            self._ledger.batch(f"p{job.proxy}", [Adopt(str(job.number), job.rid, further)])

    def ended(self, job: Job) -> None:
        """Release, and learn how long answers are."""
        self._ledger.batch(f"p{job.proxy}", [Release(str(job.number))])
        self._outputs[job.proxy].observe(job.arrival.output_tokens)


def contenders() -> dict[str, Make]:
    """Name all that are compared."""
    return {
        "random": Blind,
        "round robin": RoundRobin,
        "least connections, own": Counting,
        "two choices, own": TwoChoices,
        "least requests, 100 ms old": Stale,
        "least requests, exact": lambda s: Exact(s, tokens=False, affinity=None),
        "least requests, exact + affinity": lambda s: Exact(
            s, tokens=False, affinity=Affinity, absolute=2
        ),
        "least tokens, exact": lambda s: Exact(s, tokens=True, affinity=None),
        "least tokens, exact + affinity": lambda s: Exact(s, tokens=True, affinity=Affinity),
    }
