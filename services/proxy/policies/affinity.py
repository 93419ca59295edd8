"""Prefix affinity: which replicas probably hold the beginning of a prompt, and how much of it.

Two things are known without asking anybody. A proxy remembers where it sent which prefix. And every
proxy sends a prefix that it has not seen to the same home (see `homes`), so that what one of them
sent there, others find. How much of a prompt a home is expected to hold follows from how much of
its prompts this proxy has sent before: where nothing comes again, nothing is expected.

A prefix that this proxy has sent to several replicas is *widespread*, such as a system prompt that
all conversations begin with: it is taken to be everywhere, draws to no replica, and the home is
that of the first digest beyond it. So conversations spread, and each stays where it is.

What is offered to the ledger is a cost for each candidate, without the tokens that it is believed
to hold, and the cost elsewhere. The ledger weighs them against the load of the moment.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from services.proxy.policies.digests import CUTS, Prefix
from services.proxy.policies.homes import Homes

MEMORY: Final = 1 << 15
"""Digests that are remembered."""
WIDESPREAD: Final = 4
"""So many replicas make a prefix widespread (or all of them, where there are fewer)."""
CANDIDATES: Final = 3
REACH: Final = 3.0
"""A home is expected to hold so many times the share of a prompt that this proxy itself has usually
sent before: others have sent there what it cannot know."""
MOST: Final = 0.75
"""Never is a larger share expected."""
_SMOOTHING: Final = 0.02


class Offer(NamedTuple):
    """What a request costs, and where it costs less."""

    cost_tokens: int
    candidates: tuple[tuple[str, int], ...] = ()
    """Replica and cost there, best first."""


class Affinity:
    """What one proxy knows of the prefixes of one model."""

    def __init__(
        self,
        candidates: int = CANDIDATES,
        widespread: int = WIDESPREAD,
    ) -> None:
        self.homes = Homes()
        self._ready: frozenset[str] = frozenset()
        self._seen: dict[int, tuple[str, ...]] = {}
        self._candidates = candidates
        self._widespread = widespread
        self._known_share = 0.0

    @property
    def remembered(self) -> int:
        """How many digests are remembered."""
        return len(self._seen)

    def update(self, capacities: Mapping[str, float]) -> None:
        """Take over which replicas are READY, and their relative throughput."""
        self._ready = frozenset(capacities)
        self.homes.update(capacities)

    def offer(self, prefix: Prefix, prompt_tokens: int, further_tokens: int) -> Offer:
        """Name the candidates of a request and the costs: prompt not held, and what is further."""
        whole_tokens = prompt_tokens + further_tokens
        digests, size_bytes = prefix
        if not digests or len(self._ready) < 2:
            return Offer(whole_tokens)
        seen, ready = self._seen, self._ready
        enough = min(self._widespread, len(ready))
        held: dict[str, int] = {}
        at = len(digests) - 1
        while at >= 0:
            rids = seen.get(digests[at])
            if rids is not None:
                if len(rids) >= enough:
                    break
                for rid in rids:
                    if rid not in held and rid in ready:
                        held[rid] = at
            at -= 1
        everywhere_tokens = CUTS[at] * prompt_tokens // size_bytes if at >= 0 else 0
        costs = [
            (rid, whole_tokens - CUTS[place] * prompt_tokens // size_bytes)
            for rid, place in held.items()
        ]
        elsewhere_tokens = whole_tokens - everywhere_tokens
        if at + 1 < len(digests):
            new_bytes = size_bytes - (CUTS[at] if at >= 0 else 0)
            self._learn(held, size_bytes - new_bytes, new_bytes)
            new_tokens = prompt_tokens - everywhere_tokens
            home_tokens = elsewhere_tokens - int(new_tokens * self.expected_share)
            homes = self.homes.of(digests[at + 1])
            costs += [(rid, home_tokens) for rid in homes if rid not in held]
        return Offer(elsewhere_tokens, tuple(costs[: self._candidates]))

    @property
    def expected_share(self) -> float:
        """The share of a prompt that its home is expected to hold, where nothing better is known.

        Where prompts share nothing it is 0.
        """
        return min(MOST, REACH * self._known_share)

    def _learn(self, held: Mapping[str, int], everywhere_bytes: int, new_bytes: int) -> None:
        """Learn from a prompt how much of its new part this proxy has sent before."""
        known_bytes = CUTS[next(iter(held.values()))] - everywhere_bytes if held else 0
        self._known_share += _SMOOTHING * (known_bytes / new_bytes - self._known_share)

    def placed(self, prefix: Prefix, rid: str) -> None:
        """Remember that a request was sent to `rid`."""
        seen = self._seen
        for digest in prefix.digests:
            rids = seen.pop(digest, None)
            if rids is None:
                rids = (rid,)
            elif rids[0] != rid:
                rids = (rid, *(other for other in rids if other != rid))[: self._widespread]
            seen[digest] = rids
        while len(seen) > MEMORY:
            del seen[next(iter(seen))]
