"""From runs to figures, and from figures to a verdict. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from tests.bench.workloads import Answered, Workload


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One server under one workload, once."""

    round: int
    server: str
    answered: Answered
    cpu_us: float
    """CPU time of the server's process tree per request or token."""
    pair_us: float
    """The same of the load generator and the replicas together: it must be less."""
    others_share: float
    """Of the measured core's time, what was spent by somebody else."""
    memory_bytes: int


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one server under one workload: medians."""

    server: str
    cpu_us: float
    cpu_least_us: float
    cpu_most_us: float
    pair_us: float
    per_s: float
    ttft_p50_ms: float
    transit_p50_ms: float
    transit_p99_ms: float
    gap_p99_ms: float
    memory_mib: float
    others_share: float
    failed: int


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What one server may cost, measured against another one in the same rounds."""

    workload: str
    server: str
    against: str
    ratio: float
    says: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A budget and what came of it."""

    budget: Budget
    ratio: float
    kept: bool


BUDGETS: Final = (
    Budget(
        workload="stream",
        server="redmesh-armed",
        against="redmesh-disarmed",
        ratio=1.25,
        says="CPU per token with stream failover armed, against the same path disarmed",
    ),
)


def figure(workload: Workload, runs: Sequence[Run]) -> Figure:
    """Sum up the runs of one server."""

    def median(*values: float) -> float:
        return statistics.median(values)

    cpu_us = [run.cpu_us for run in runs]
    answers = [run.answered for run in runs]
    return Figure(
        server=runs[0].server,
        cpu_us=median(*cpu_us),
        cpu_least_us=min(cpu_us),
        cpu_most_us=max(cpu_us),
        pair_us=median(*(run.pair_us for run in runs)),
        per_s=median(*(a.units(workload) / a.seconds for a in answers)),
        ttft_p50_ms=median(*(a.ttft_ms.p50 for a in answers)),
        transit_p50_ms=median(*(a.transit_ms.p50 for a in answers)),
        transit_p99_ms=median(*(a.transit_ms.p99 for a in answers)),
        gap_p99_ms=median(*(a.gap_ms.p99 for a in answers)),
        memory_mib=median(*(run.memory_bytes / 2**20 for run in runs)),
        others_share=median(*(run.others_share for run in runs)),
        failed=sum(sum(a.failed.values()) for a in answers),
    )


def ratio(runs: Mapping[str, Sequence[Run]], server: str, against: str) -> float:
    """Compare two servers round by round, and take the median: what disturbs a round hits both."""
    pairs = zip(runs[server], runs[against], strict=True)
    return statistics.median(one.cpu_us / other.cpu_us for one, other in pairs)


def judge(
    workload: Workload, runs: Mapping[str, Sequence[Run]], budgets: Sequence[Budget] = BUDGETS
) -> list[Verdict]:
    """Judge every budget for which both servers were measured."""
    verdicts: list[Verdict] = []
    for budget in budgets:
        if budget.workload == workload.name and {budget.server, budget.against} <= runs.keys():
            found = ratio(runs, budget.server, budget.against)
            verdicts.append(Verdict(budget=budget, ratio=found, kept=found <= budget.ratio))
    return verdicts
