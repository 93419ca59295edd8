"""The workload `reserve`: what the ledger carries, and whether that is enough."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from tests.bench.machine import Cores
from tests.bench.reserving import Reserving, reserve, table
from tests.bench.servers import redis_pid
from tests.support.servers import RedisServer, any_binary

ROUNDS: Final = 3
JUDGED_PROXIES: Final = 2
LEAST_PAIRS_PER_S: Final = 50_000.0
MOST_PROXY_US: Final = 15.0
FLAT: Final = 0.8
"""Of the pairs per second at the fewest replicas, what there must be at the most replicas."""


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """A budget of the ledger, and what came of it."""

    says: str
    kept: bool

    def __str__(self) -> str:
        return f"budget {'kept' if self.kept else 'MISSED'}: {self.says}"


class LedgerOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was measured of the ledger, and what it comes to."""

    measures: list[Reserving]
    bounds: list[Bound]

    @property
    def good(self) -> bool:
        """Tell whether every budget was kept."""
        return all(bound.kept for bound in self.bounds)

    def text(self) -> str:
        """Show it."""
        title = "\nreserve: pairs of reserve and release; Redis has a core, the proxies the other"
        return "\n".join([title, table(self.measures), *(str(each) for each in self.bounds)])


def judge(measures: Sequence[Reserving]) -> list[Bound]:
    """Judge the measures at two proxies, and that none was spoilt."""
    judged = sorted(
        (each for each in measures if each.proxies == JUDGED_PROXIES), key=lambda m: m.replicas
    )
    bounds: list[Bound] = []
    for each in judged:
        where = f"{each.replicas} replicas, {each.proxies} proxies"
        pairs, cost_us = each.pairs_per_s, each.proxy_us
        bounds += [
            Bound(
                says=f"{where}: {pairs:,.0f} pairs/s (at least {LEAST_PAIRS_PER_S:,.0f})",
                kept=pairs >= LEAST_PAIRS_PER_S,
            ),
            Bound(
                says=f"{where}: {cost_us:.1f} µs a pair at the proxy (at most {MOST_PROXY_US:g})",
                kept=cost_us <= MOST_PROXY_US,
            ),
        ]
    if len(judged) > 1:
        few, many = judged[0], judged[-1]
        share = many.pairs_per_s / few.pairs_per_s
        bounds.append(
            Bound(
                says=f"pairs/s at {many.replicas} replicas × {share:.2f} of those at "
                f"{few.replicas} (at least × {FLAT:g})",
                kept=share >= FLAT,
            )
        )
    local = sum(each.local for each in measures)
    bounds.append(Bound(says=f"reserves decided without the ledger: {local} (0)", kept=not local))
    return bounds


async def measure_ledger(folder: Path, cores: Cores, rounds: int | None) -> LedgerOutcome:
    """Measure the ledger at all numbers of replicas and proxies, with a Redis of its own."""
    server = RedisServer(any_binary(), folder / "redis")
    try:
        os.sched_setaffinity(redis_pid(server), {cores.measured})
        measures = await reserve(server, cores, rounds=rounds or ROUNDS)
    finally:
        server.kill()
    return LedgerOutcome(measures=measures, bounds=judge(measures))
