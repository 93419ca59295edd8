"""The committed baseline: what redmesh cost beside nginx once, and whether it costs more now. Pure.

The rule: it is a regression when the median of the rounds' ratios is more than 5 % above the
baseline's median, and three quarters of this run's rounds are above three quarters of the
baseline's. The first keeps a very even run from failing for next to nothing, the second keeps an
uneven one from failing by chance. With fewer than three rounds nothing is compared.
"""

import statistics
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final

import msgspec

from tests.bench.budgets import OURS
from tests.bench.judging import YARDSTICK, Runs, ratios

TOLERATED: Final = 0.05
LEAST_ROUNDS: Final = 3


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """CPU time against nginx in the same rounds: the median and the quartiles of the rounds."""

    median: float
    low: float
    high: float
    rounds: int


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of one workload."""

    taken: str
    """When, and on what machine."""
    servers: dict[str, Ratio]


Baseline = dict[str, Entry]
"""What is committed, by workload."""


class Trend(StrEnum):
    """What became of a ratio."""

    WORSE = "WORSE"
    SAME = "same"
    BETTER = "better"


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio then and now."""

    server: str
    then: Ratio
    now: Ratio
    trend: Trend

    def __str__(self) -> str:
        return (
            f"baseline {self.trend.value}: {self.server}: × {self.now.median:.2f} of {YARDSTICK}'s "
            f"CPU time ({self.now.low:.2f} to {self.now.high:.2f}), then × {self.then.median:.2f} "
            f"({self.then.low:.2f} to {self.then.high:.2f})"
        )


def ratio_of(values: Sequence[float]) -> Ratio:
    """Sum up the ratios of the rounds."""
    if len(values) == 1:
        low = high = values[0]
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    middle = statistics.median(values)
    return Ratio(
        median=round(middle, 3), low=round(low, 3), high=round(high, 3), rounds=len(values)
    )


def measured(runs: Runs) -> dict[str, Ratio]:
    """Give what of a workload's runs a baseline keeps: nothing unless there are rounds enough."""
    if YARDSTICK not in runs or len(runs[YARDSTICK]) < LEAST_ROUNDS:
        return {}
    return {name: ratio_of(ratios(runs, name, YARDSTICK)) for name in OURS if name in runs}


def compare(then: Mapping[str, Ratio], now: Mapping[str, Ratio]) -> list[Change]:
    """Compare what is in both."""
    return [
        Change(server=name, then=then[name], now=now[name], trend=_trend(then[name], now[name]))
        for name in now
        if name in then
    ]


def renewed(old: Baseline, taken: str, measured: Mapping[str, Mapping[str, Ratio]]) -> Baseline:
    """Replace the workloads that were measured, and keep the others."""
    new = {
        workload: Entry(taken=taken, servers=dict(servers))
        for workload, servers in measured.items()
        if servers
    }
    return {**old, **new}


def _trend(then: Ratio, now: Ratio) -> Trend:
    if now.median > then.median * (1 + TOLERATED) and now.low > then.high:
        return Trend.WORSE
    if now.median < then.median * (1 - TOLERATED) and now.high < then.low:
        return Trend.BETTER
    return Trend.SAME
