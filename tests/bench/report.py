"""What is shown and written of one workload. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import msgspec

from tests.bench.baseline import Change, Entry, Ratio, Trend, compare, measured
from tests.bench.budgets import Verdict, judge
from tests.bench.judging import YARDSTICK, Figure, Run, Runs, figure, pair_weighs, ratios
from tests.bench.workloads import Workload

_WIDTHS: Final = (17, 15, 17, 9, 13, 10, 15, 8, 6, 11, 9, 8, 8)


class Judged(Protocol):
    """What a workload of any kind comes to; encoded as JSON, it is what is kept of it."""

    @property
    def good(self) -> bool:
        """Tell whether nothing is wrong."""
        ...

    def text(self) -> str:
        """Show it."""
        ...


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One workload over HTTP: everything that was measured, and what it comes to."""

    workload: Workload
    figures: list[Figure]
    verdicts: list[Verdict]
    changes: list[Change]
    ratios: dict[str, Ratio]
    """What a baseline keeps of it."""
    runs: dict[str, list[Run]]

    @property
    def good(self) -> bool:
        """Tell whether every budget was kept and nothing of ours became dearer or failed."""
        dearer = any(change.trend is Trend.WORSE for change in self.changes)
        return not dearer and all(verdict.kept for verdict in self.verdicts)

    def text(self) -> str:
        """Show it."""
        return table(self)


def conclude(workload: Workload, runs: Runs, baseline: Mapping[str, Entry]) -> Outcome:
    """Sum up a workload, and judge it."""
    then = baseline[workload.name].servers if workload.name in baseline else {}
    now = measured(runs)
    return Outcome(
        workload=workload,
        figures=[figure(each) for each in runs.values()],
        verdicts=judge(workload.name, runs),
        changes=compare(then, now),
        ratios=now,
        runs={name: list(each) for name, each in runs.items()},
    )


def table(outcome: Outcome) -> str:
    """Show one workload."""
    workload = outcome.workload
    unit = workload.unit
    head = (
        "",
        f"CPU µs/{unit}",
        "(least-most)",
        f"× {YARDSTICK}",
        f"{unit}s/s",
        "TTFT p50",
        "added p50/p99",
        "jitter",
        "MiB",
        "KB/stream",
        "pair µs",
        "others",
        "failed",
    )
    rounds = max(len(each) for each in outcome.runs.values())
    times = "1 round" if rounds == 1 else f"medians of {rounds} rounds"
    says = workload.says.format(users=f"{workload.users:,}")
    lines = [f"\n{workload.name}: {says}; {times}; times in ms", _row(head)]
    lines += [_row(_cells(each, outcome.runs)) for each in outcome.figures]
    lines += [line for line in [pair_weighs(workload, outcome.runs)] if line]
    lines += [
        f"failed: {each.server}: {first}"
        for each in outcome.figures
        if (first := first_failure(outcome.runs[each.server]))
    ]
    lines += [str(each) for each in (*outcome.verdicts, *outcome.changes)]
    return "\n".join(lines)


def first_failure(runs: Sequence[Run]) -> str:
    """Give what the load generator said of the first bad answer."""
    return next((run.answered.first_failure for run in runs if run.failed), "")


def _cells(each: Figure, runs: Runs) -> tuple[str, ...]:
    beside = YARDSTICK in runs and each.cpu_us > 0
    against = f"{statistics.median(ratios(runs, each.server, YARDSTICK)):.2f}" if beside else "–"
    return (
        each.server,
        f"{each.cpu_us:.1f}",
        f"({each.cpu_least_us:.1f}-{each.cpu_most_us:.1f})",
        against,
        f"{each.per_s:,.0f}",
        f"{each.ttft_p50_ms:.2f}",
        f"{each.added_p50_ms:.2f}/{each.added_p99_ms:.2f}",
        f"{each.jitter_p99_ms:.2f}",
        f"{each.memory_mib:.0f}",
        f"{each.stream_kb:.1f}",
        f"{each.pair_us:.1f}",
        f"{each.others_share:.0%}",
        str(each.failed),
    )


def _row(cells: Sequence[str]) -> str:
    first, *rest = zip(cells, _WIDTHS, strict=True)
    return first[0].ljust(first[1]) + "".join(cell.rjust(width) for cell, width in rest)
