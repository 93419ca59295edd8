"""What redmesh may cost: bounds that stay, each judged by the median of a run's rounds. Pure."""

import statistics
from collections.abc import Sequence
from enum import StrEnum
from typing import Final

import msgspec

from tests.bench.judging import MEANINGS, YARDSTICK, Measure, Runs, differences, ratios

ARMED: Final = "redmesh-armed"
DISARMED: Final = "redmesh-disarmed"
OURS: Final = (ARMED, DISARMED)
TWO_WORKERS: Final = "redmesh-two-workers"
ROUTERS: Final = ("vllm-router", "sglang-router")


class Compared(StrEnum):
    """What is bounded."""

    ITSELF = "itself"
    RATIO = "ratio"
    """Times what another server had in the same round."""
    DIFFERENCE = "difference"
    """Beyond what another server had in the same round."""


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """A bound on one measure of one server under one workload."""

    workload: str
    server: str
    measure: Measure
    bound: float
    at_least: bool = False
    """The bound is from below."""
    compared: Compared = Compared.ITSELF
    against: str = ""

    def says(self) -> str:
        """Name what is bounded."""
        beside = {
            Compared.ITSELF: "",
            Compared.RATIO: f", against {self.against}",
            Compared.DIFFERENCE: f", beyond {self.against}",
        }
        return f"{self.server}: {self.measure.value}{beside[self.compared]}"

    def shows(self, value: float) -> str:
        """Write a value as this budget counts it."""
        number = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        if self.compared is Compared.RATIO:
            return f"× {number}"
        return f"{number} {MEANINGS[self.measure].unit}".strip()


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A budget and what came of it."""

    budget: Budget
    value: float
    kept: bool

    def __str__(self) -> str:
        word = "kept" if self.kept else "MISSED"
        side = "at least" if self.budget.at_least else "at most"
        shows = self.budget.shows
        says = self.budget.says()
        return f"budget {word}: {says}: {shows(self.value)} ({side} {shows(self.budget.bound)})"


def _cpu(workload: str, server: str, against: str, bound: float) -> Budget:
    return Budget(
        workload=workload,
        server=server,
        measure=Measure.CPU,
        bound=bound,
        compared=Compared.RATIO,
        against=against,
    )


def _at_most(workload: str, measure: Measure, bound: float) -> tuple[Budget, ...]:
    return tuple(
        Budget(workload=workload, server=server, measure=measure, bound=bound) for server in OURS
    )


BUDGETS: Final = (
    *(_cpu("unary", server, YARDSTICK, 4.0) for server in OURS),
    *(_cpu("unary", server, router, 1.0) for server in OURS for router in ROUTERS),
    _cpu("unary", TWO_WORKERS, ARMED, 2 / 1.8),  # so that two cores carry 1.8 times as much
    _cpu("stream", DISARMED, YARDSTICK, 1.35),
    _cpu("stream", ARMED, YARDSTICK, 1.6),
    _cpu("stream", ARMED, DISARMED, 1.25),
    *(_cpu("stream", DISARMED, router, 1.0) for router in ROUTERS),
    *_at_most("stream", Measure.ADDED_P50, 1.0),
    *_at_most("stream", Measure.ADDED_P99, 5.0),
    *(
        Budget(
            workload="stream",
            server=server,
            measure=Measure.JITTER_P99,
            bound=2.0,
            compared=Compared.DIFFERENCE,
            against=YARDSTICK,
        )
        for server in OURS
    ),
    *(
        Budget(
            workload="saturate",
            server=server,
            measure=Measure.RATE,
            bound=1.0,
            at_least=True,
            compared=Compared.RATIO,
            against=router,
        )
        for server in OURS
        for router in ROUTERS
    ),
    *_at_most("headline", Measure.ADDED_P99, 5.0),
    *_at_most("headline", Measure.TRANSIT_P99, 5.0),
    *_at_most("long", Measure.STREAM_KB, 40.0),
    *(
        budget
        for workload in ("unary", "stream", "saturate", "headline", "long")
        for budget in _at_most(workload, Measure.FAILED, 0.0)
    ),
)


def judge(workload: str, runs: Runs, budgets: Sequence[Budget] = BUDGETS) -> list[Verdict]:
    """Judge every budget of a workload for which all that it compares was measured."""
    verdicts: list[Verdict] = []
    for budget in budgets:
        needed = {budget.server, budget.against} - {""}
        if budget.workload != workload or not needed <= runs.keys():
            continue
        value = _value(budget, runs)
        kept = value >= budget.bound if budget.at_least else value <= budget.bound
        verdicts.append(Verdict(budget=budget, value=value, kept=kept))
    return verdicts


def _value(budget: Budget, runs: Runs) -> float:
    if budget.compared is Compared.RATIO:
        return statistics.median(ratios(runs, budget.server, budget.against, budget.measure))
    if budget.compared is Compared.DIFFERENCE:
        return statistics.median(differences(runs, budget.server, budget.against, budget.measure))
    values = [MEANINGS[budget.measure].value(run) for run in runs[budget.server]]
    return sum(values) if budget.measure is Measure.FAILED else statistics.median(values)
