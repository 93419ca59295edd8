"""Compares three accounts of what is running: the ledger, the proxies, the engines. Pure.

Invariant of the ledger, per model: the leases are the truth, and for every replica the sum of its
leases equals its totals (`nreq`, `cost`), which give its score in `ready`; the sum over replicas
is the model's total `*`. Every lease is a live request of its proxy, and every live request has a
lease. What the proxies believe to run on an engine is what the engine counts.

The ledger's own accounts are read at one moment, but proxies and engines are asked apart from it:
one look cannot tell drift from a request that began or ended meanwhile. Races differ from look to
look; drift stays. So a finding counts only when each of several looks, a second apart, shows the
same one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Final

import msgspec

from shared.models.routing import Lease

FULL: Final = 4e15
"""Added to the score of a replica at its request cap; loads are held below it."""

ENGINE_TOLERANCE: Final = 0.25
"""Under load engines report up to a second late: such a share may differ, but at least"""
ENGINE_SLACK: Final = 4
"""… this many requests."""


class Kind(StrEnum):
    """What disagrees."""

    REQUESTS = "requests"
    """A total of requests is not the number of leases."""
    COST = "cost"
    """A total of cost is not the sum of the leases' cost."""
    SCORE = "score"
    """A place in `ready` does not follow from the totals."""
    LEASE_WITHOUT_REQUEST = "lease-without-request"
    """The ledger holds a reservation that its proxy does not know: a leak."""
    REQUEST_WITHOUT_LEASE = "request-without-lease"
    """A proxy relays a request that the ledger does not count."""
    LEASE_DIFFERS = "lease-differs"
    """Ledger and proxy name another replica or cost for a request."""
    LEASE_OF_UNKNOWN_PROXY = "lease-of-unknown-proxy"
    """The holder of reservations is gone, and nobody has reaped them."""
    PROXY_SILENT = "proxy-silent"
    """A proxy could not be asked for its live requests."""
    ENGINE = "engine"
    """An engine counts other requests than the proxies do."""


COUNTED: Final = frozenset({Kind.REQUESTS, Kind.COST, Kind.SCORE})
"""What a recount from the leases mends."""

ADVICE: Final[Mapping[Kind, str]] = MappingProxyType(
    {
        Kind.REQUESTS: "totals that do not follow from the leases: somebody changed keys by hand. "
        "Proxies recount every 30 s; `redmesh audit --repair` does it now",
        Kind.COST: "as with `requests`: `redmesh audit --repair` works it out anew",
        Kind.SCORE: "a wrong place in `ready` sends this replica too much or too little: `redmesh "
        "audit --repair` works it out anew",
        Kind.LEASE_WITHOUT_REQUEST: "capacity is held for nothing. Its proxy compares every 30 s, "
        "and after each lost call: if it stays, that proxy does not reach Redis (see its log)",
        Kind.REQUEST_WITHOUT_LEASE: "load that nobody counts. Its proxy reports it with its next "
        "beats: if it stays, that proxy does not reach Redis (see its log)",
        Kind.LEASE_DIFFERS: "ledger and proxy disagree on one request. The proxy mends it when it "
        "compares, at the latest every 30 s",
        Kind.LEASE_OF_UNKNOWN_PROXY: "a dead proxy's reservations. Other proxies and the "
        "controller drop them some 7 s after its last beat; `redmesh audit --repair` does it where "
        "neither is left",
        Kind.PROXY_SILENT: "its requests are unknown here: run the audit where the proxies' admin "
        "ports can be reached",
        Kind.ENGINE: "more in the engine: requests that no proxy waits for any more, or a client "
        "that goes around the proxies. Fewer: the proxy waits for an answer that will not come",
    }
)
"""What each disagreement means, and what to do about it."""


class Live(msgspec.Struct, frozen=True):
    """One request as its proxy knows it."""

    rid: str
    cost_tokens: int


class ModelSample(msgspec.Struct, frozen=True, kw_only=True):
    """One look at one model."""

    leases: dict[str, dict[str, Lease]]
    """Proxy → request → reservation."""
    requests: dict[str, int]
    """Replica → outstanding requests; `*` is the model's."""
    costs: dict[str, int]
    ready: dict[str, float]
    """Replica → score."""
    weights: dict[str, str]
    """Replica → "inverse-throughput cap penalty"."""
    live: dict[str, dict[str, Live] | None]
    """Proxy → its live requests; None: it did not answer."""
    engines: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """Replica → requests its engine runs or queues; only engines that nobody else uses."""
    unheard: tuple[str, ...] = ()
    """Replicas of that kind whose engine's count is not known: too old, or never told."""


class Finding(msgspec.Struct, frozen=True, order=True):
    """One disagreement. Two looks show the same one when kind, subject and delta are equal."""

    model: str
    kind: Kind
    subject: str
    """Replica, request or proxy."""
    delta: int
    """How far off, where that is a number."""
    text: str = msgspec.field(default="", name="explanation")

    @property
    def identity(self) -> tuple[str, str, str, int]:
        """What makes it the same finding in another look; an engine's delta moves with the load."""
        sign = (self.delta > 0) - (self.delta < 0)
        delta = sign if self.kind is Kind.ENGINE else self.delta
        return self.model, self.kind, self.subject, delta


def judge(looks: Sequence[Mapping[str, ModelSample]]) -> list[Finding]:
    """Give the findings that every look shows, as the last look puts them."""
    if not looks:
        return []
    shown = [{finding.identity: finding for finding in findings_of(look)} for look in looks]
    return sorted(
        finding
        for identity, finding in shown[-1].items()
        if all(identity in earlier for earlier in shown[:-1])
    )


def findings_of(look: Mapping[str, ModelSample]) -> list[Finding]:
    """Give every disagreement of one look, races included."""
    return [finding for model, sample in sorted(look.items()) for finding in _model(model, sample)]


def _model(model: str, sample: ModelSample) -> Iterator[Finding]:
    yield from _totals(model, sample)
    yield from _scores(model, sample)
    yield from _requests(model, sample)
    yield from _engines(model, sample)


def _totals(model: str, sample: ModelSample) -> Iterator[Finding]:
    held = _tally(lease for leases in sample.leases.values() for lease in leases.values())
    sums = {rid: count for rid, (count, _) in held.items()} | {
        "*": sum(count for count, _ in held.values())
    }
    for rid in sorted(sums.keys() | sample.requests.keys()):
        total, counted = sample.requests.get(rid, 0), sums.get(rid, 0)
        if total != counted:
            yield Finding(
                model,
                Kind.REQUESTS,
                rid,
                total - counted,
                f"the total says {total} requests, the leases are {counted}",
            )
    for rid in sorted((held.keys() | sample.costs.keys()) - {"*"}):
        total, counted = sample.costs.get(rid, 0), held.get(rid, (0, 0))[1]
        if total != counted:
            yield Finding(
                model,
                Kind.COST,
                rid,
                total - counted,
                f"the total says {total} tokens, the leases sum up to {counted}",
            )


def _scores(model: str, sample: ModelSample) -> Iterator[Finding]:
    for rid, score in sorted(sample.ready.items()):
        expected = expected_score(
            sample.costs.get(rid, 0), sample.requests.get(rid, 0), sample.weights.get(rid, "")
        )
        if score != expected:
            yield Finding(
                model,
                Kind.SCORE,
                rid,
                round(score - expected),
                f"the score in `ready` is {score:.0f}, its totals give {expected:.0f}",
            )


def expected_score(cost_tokens: int, requests: int, weight: str) -> float:
    """Compute the place of a replica in `ready` as the ledger's scripts do."""
    parts = weight.split()
    numbers = [int(part) for part in parts] if all(part.isdigit() for part in parts) else []
    inverse, cap, penalty = numbers if len(numbers) == 3 else (1000, 256, 0)
    load = min(float(cost_tokens * inverse + penalty), FULL - 1)
    return load + FULL if requests >= cap else load


def _requests(model: str, sample: ModelSample) -> Iterator[Finding]:
    for proxy in sorted(sample.leases.keys() | sample.live.keys()):
        leases = sample.leases.get(proxy, {})
        if proxy not in sample.live:
            if leases:
                yield Finding(
                    model,
                    Kind.LEASE_OF_UNKNOWN_PROXY,
                    proxy,
                    len(leases),
                    f"{len(leases)} reservations of a proxy that is gone, not reaped yet",
                )
            continue
        live = sample.live[proxy]
        if live is None:
            yield Finding(
                model,
                Kind.PROXY_SILENT,
                proxy,
                0,
                "the proxy does not tell its live requests: is its admin port reachable from here?",
            )
            continue
        yield from _compare(model, proxy, leases, live)


def _compare(
    model: str, proxy: str, leases: Mapping[str, Lease], live: Mapping[str, Live]
) -> Iterator[Finding]:
    for request in sorted(leases.keys() | live.keys()):
        lease, mine = leases.get(request), live.get(request)
        if mine is None and lease is not None:
            yield Finding(
                model,
                Kind.LEASE_WITHOUT_REQUEST,
                request,
                1,
                f"{proxy} holds {lease.cost_tokens} tokens on {lease.rid} for a request that it "
                "does not know",
            )
        elif lease is None and mine is not None:
            yield Finding(
                model,
                Kind.REQUEST_WITHOUT_LEASE,
                request,
                1,
                f"{proxy} relays it on {mine.rid}, and the ledger has no reservation for it",
            )
        elif lease and mine and (lease.rid, lease.cost_tokens) != (mine.rid, mine.cost_tokens):
            yield Finding(
                model,
                Kind.LEASE_DIFFERS,
                request,
                lease.cost_tokens - mine.cost_tokens,
                f"ledger: {lease.cost_tokens} tokens on {lease.rid}; {proxy}: "
                f"{mine.cost_tokens} tokens on {mine.rid}",
            )


def _engines(model: str, sample: ModelSample) -> Iterator[Finding]:
    """Compare engines with proxies: exactly when all is quiet, else with tolerance."""
    if any(live is None for live in sample.live.values()):
        return  # what a silent proxy relays is unknown
    counted: dict[str, int] = {}
    for live in sample.live.values():
        for request in (live or {}).values():
            counted[request.rid] = counted.get(request.rid, 0) + 1
    for rid, running in sorted(sample.engines.items()):
        ours = counted.get(rid, 0)
        slack = max(ENGINE_SLACK, round(ENGINE_TOLERANCE * max(ours, running))) if counted else 0
        if abs(running - ours) > slack:
            yield Finding(
                model,
                Kind.ENGINE,
                rid,
                running - ours,
                f"the engine counts {running} requests, the proxies {ours}",
            )


def _tally(leases: Iterable[Lease]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for lease in leases:
        count, cost = found.get(lease.rid, (0, 0))
        found[lease.rid] = count + 1, cost + lease.cost_tokens
    return found
