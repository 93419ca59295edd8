"""The ledger's invariants, checked on a server's data after each script."""

from services.cli.audit import expected_score
from shared.registry.keys import ModelKeys
from tests.simulation.store import Store


class BrokenError(AssertionError):
    """An invariant does not hold."""


def ledger_sums(store: Store, keys: ModelKeys) -> None:
    """Totals are the sums of the leases, none is negative, and each score follows from them."""
    counts: dict[str, int] = {}
    costs: dict[str, int] = {}
    prefix = keys.prefix + "lease:"
    for key in store.data:
        if key.startswith(prefix):
            for text in store.hash(key).values():
                rid, _, cost = text.partition(" ")
                counts[rid] = counts.get(rid, 0) + 1
                costs[rid] = costs.get(rid, 0) + int(cost)
    if counts:
        counts["*"] = sum(counts.values())
    stored = {rid: int(text) for rid, text in store.hash(keys.nreq).items()}
    if stored != counts:
        raise BrokenError(f"requests: totals {stored}, leases {counts}")
    stored = {rid: int(text) for rid, text in store.hash(keys.cost).items()}
    if stored != costs:
        raise BrokenError(f"costs: totals {stored}, leases {costs}")
    weights = store.hash(keys.weight)
    for rid, score in store.zset(keys.ready).items():
        wanted = expected_score(costs.get(rid, 0), counts.get(rid, 0), weights.get(rid, ""))
        if score != wanted:
            raise BrokenError(f"score of {rid} is {score:.0f}, not {wanted:.0f}")


class Versions:
    """Versions (or epochs) that were ever handed out: none comes twice, whatever was forgotten."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._given: set[str] = set()
        self._now: dict[int, str] = {}

    def seen(self, server: int, value: str | None) -> None:
        """Note the value on a server after a script; a change must bring a new one."""
        if value is None or self._now.get(server) == value:
            return
        first = server not in self._now
        if not first and int(value) < int(self._now[server]):
            raise BrokenError(f"{self._what} fell from {self._now[server]} to {value}")
        self._now[server] = value
        if value in self._given and not first:
            raise BrokenError(f"{self._what} {value} was given twice")
        self._given.add(value)
