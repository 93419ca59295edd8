"""From runs to figures, and from figures to comparisons. Pure."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Final

import msgspec

from tests.bench.workloads import Answered, Workload

YARDSTICK: Final = "nginx"
Runs = Mapping[str, Sequence["Run"]]
"""All runs of one workload: for each server its own, one a round."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One server under one workload, once."""

    round: int
    server: str
    answered: Answered
    cpu_us: float
    """CPU time of the server's process tree per request or token."""
    pair_us: float
    """The same of the load generator and the replicas together: it must be less."""
    per_s: float
    """Requests or tokens per second."""
    others_share: float
    """Of the measured core's time, what was spent by somebody else."""
    memory_bytes: int
    """The most it had in memory while it ran."""
    idle_bytes: int
    """What it had in memory before the first run of the workload."""

    @property
    def failed(self) -> int:
        """Count the answers that were not good."""
        return sum(self.answered.failed.values())

    @property
    def stream_bytes(self) -> float:
        """What each request in flight took of memory, at the most."""
        return max(0, self.memory_bytes - self.idle_bytes) / max(1, self.answered.in_flight)


class Measure(StrEnum):
    """What of a run can be judged."""

    CPU = "CPU time a unit"
    RATE = "units per second"
    ADDED_P50 = "added to the first token, p50"
    ADDED_P99 = "added to the first token, p99"
    TRANSIT_P99 = "added to any token, p99"
    JITTER_P99 = "jitter between tokens, p99"
    STREAM_KB = "memory per stream"
    FAILED = "failed answers"


class Meaning(msgspec.Struct, frozen=True):
    """How a measure is read from a run, and its unit."""

    value: Callable[[Run], float]
    unit: str


MEANINGS: Final[Mapping[Measure, Meaning]] = {
    Measure.CPU: Meaning(lambda run: run.cpu_us, "µs"),
    Measure.RATE: Meaning(lambda run: run.per_s, "/s"),
    Measure.ADDED_P50: Meaning(lambda run: run.answered.added_ms.p50, "ms"),
    Measure.ADDED_P99: Meaning(lambda run: run.answered.added_ms.p99, "ms"),
    Measure.TRANSIT_P99: Meaning(lambda run: run.answered.transit_ms.p99, "ms"),
    Measure.JITTER_P99: Meaning(lambda run: run.answered.jitter_ms.p99, "ms"),
    Measure.STREAM_KB: Meaning(lambda run: run.stream_bytes / 1e3, "KB"),
    Measure.FAILED: Meaning(lambda run: float(run.failed), ""),
}


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one server under one workload: medians."""

    server: str
    cpu_us: float
    cpu_least_us: float
    cpu_most_us: float
    pair_us: float
    per_s: float
    ttft_p50_ms: float
    added_p50_ms: float
    added_p99_ms: float
    transit_p99_ms: float
    jitter_p99_ms: float
    memory_mib: float
    stream_kb: float
    in_flight: int
    others_share: float
    failed: int


def figure(runs: Sequence[Run]) -> Figure:
    """Sum up the runs of one server."""

    def median(value: Callable[[Run], float]) -> float:
        return statistics.median(value(run) for run in runs)

    def of(measure: Measure) -> float:
        return median(MEANINGS[measure].value)

    return Figure(
        server=runs[0].server,
        cpu_us=of(Measure.CPU),
        cpu_least_us=min(run.cpu_us for run in runs),
        cpu_most_us=max(run.cpu_us for run in runs),
        pair_us=median(lambda run: run.pair_us),
        per_s=of(Measure.RATE),
        ttft_p50_ms=median(lambda run: run.answered.ttft_ms.p50),
        added_p50_ms=of(Measure.ADDED_P50),
        added_p99_ms=of(Measure.ADDED_P99),
        transit_p99_ms=of(Measure.TRANSIT_P99),
        jitter_p99_ms=of(Measure.JITTER_P99),
        memory_mib=median(lambda run: run.memory_bytes / 2**20),
        stream_kb=of(Measure.STREAM_KB),
        in_flight=max(run.answered.in_flight for run in runs),
        others_share=median(lambda run: run.others_share),
        failed=sum(run.failed for run in runs),
    )


def ratios(runs: Runs, server: str, against: str, measure: Measure = Measure.CPU) -> list[float]:
    """Compare two servers round by round: what disturbs a round hits both."""
    value = MEANINGS[measure].value
    pairs = zip(runs[server], runs[against], strict=True)
    return [value(one) / max(value(other), 1e-9) for one, other in pairs]


def differences(runs: Runs, server: str, against: str, measure: Measure) -> list[float]:
    """Subtract what another server had in the same round."""
    value = MEANINGS[measure].value
    return [value(one) - value(o) for one, o in zip(runs[server], runs[against], strict=True)]


def pair_weighs(workload: Workload, runs: Runs) -> str:
    """Say so where the load and the replicas cost more than what they measure; else nothing."""
    for each in (figure(list(own)) for own in runs.values()):
        if 0 < each.cpu_us < each.pair_us:
            return (
                f"note: the pair cost {each.pair_us:.1f} µs per {workload.unit}, and {each.server} "
                f"only {each.cpu_us:.1f}: what it can do at most is not seen here, what it costs is"
            )
    return ""
