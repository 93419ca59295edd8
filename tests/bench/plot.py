"""Bars as SVG, without a plotting library: what each server costs, for the documentation. Pure."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

import msgspec

from tests.bench.baseline import ratio_of
from tests.bench.judging import MEANINGS, YARDSTICK, Measure, Runs, ratios

WIDTH: Final = 760
LEFT, RIGHT = 150, 90
ROW, GAP, HEAD, FOOT = 24, 6, 34, 14
_INK: Final = {"redmesh": "#c22f3d", "nginx": "#59636e"}
_OTHERS: Final = "#8aa4c8"
_STYLE: Final = (
    "text{font:13px system-ui,sans-serif;fill:#1f2328}"
    ".title{font-weight:600}.unit{fill:#59636e;font-weight:400}"
    ".whisker{stroke:#1f2328;stroke-width:1.2}.grid{stroke:#d1d9e0}"
    ".tick{font-size:11px;fill:#59636e}"
)


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """One server's value, and between what the middle half of the rounds lay."""

    label: str
    value: float
    low: float
    high: float


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """Some servers side by side."""

    title: str
    unit: str
    bars: tuple[Bar, ...]


def cost_charts(measured: Mapping[str, Runs]) -> list[Chart]:
    """Draw CPU time against nginx: one chart for each workload with nginx in it."""
    return [
        Chart(
            title=workload,
            unit=f"CPU time, × {YARDSTICK} in the same round",
            bars=tuple(_bar(name, ratios(runs, name, YARDSTICK)) for name in _processes(runs)),
        )
        for workload, runs in measured.items()
        if YARDSTICK in runs
    ]


def measure_charts(
    measured: Mapping[str, Runs], measures: Sequence[Measure], workloads: Sequence[str]
) -> list[Chart]:
    """Draw measures as they are: one chart for each workload and measure."""
    return [
        Chart(
            title=f"{workload}: {measure.value}",
            unit=MEANINGS[measure].unit,
            bars=tuple(
                _bar(name, [MEANINGS[measure].value(run) for run in measured[workload][name]])
                for name in _processes(measured[workload])
            ),
        )
        for workload in workloads
        if workload in measured
        for measure in measures
    ]


def svg(charts: Sequence[Chart]) -> str:
    """Draw charts below each other."""
    parts: list[str] = []
    top = 0
    for chart in charts:
        parts += _chart(chart, top)
        top += _height(chart)
    size = f'viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{WIDTH}" height="{top}" fill="#ffffff"/>',
        *parts,
        "</svg>\n",
    ]
    return "\n".join(lines)


def top_of(chart: Chart) -> float:
    """Give the end of a chart's axis: the highest whisker, rounded up to two digits."""
    highest = max((max(bar.value, bar.high) for bar in chart.bars), default=0.0)
    if highest <= 0:
        return 1.0
    step = 10.0 ** (math.floor(math.log10(highest)) - 1) * 5
    return math.ceil(highest / step) * step


def _bar(name: str, values: Sequence[float]) -> Bar:
    spread = ratio_of(values)
    return Bar(label=name, value=spread.median, low=spread.low, high=spread.high)


def _processes(runs: Runs) -> list[str]:
    return [name for name in runs if name != "direct"]


def _height(chart: Chart) -> int:
    return HEAD + len(chart.bars) * (ROW + GAP) + FOOT


def _chart(chart: Chart, top: int) -> list[str]:
    end = top_of(chart)
    wide = WIDTH - LEFT - RIGHT
    floor = top + HEAD + len(chart.bars) * (ROW + GAP)
    unit = f'<tspan class="unit" dx="8">{escape(chart.unit)}</tspan>'
    title = f'<text class="title" x="{LEFT}" y="{top + 20}">{escape(chart.title)}{unit}</text>'
    parts = [title]
    for share in (0.0, 0.5, 1.0):
        x, tick = LEFT + wide * share, f"{end * share:g}"
        parts.append(
            f'<line class="grid" x1="{x}" x2="{x}" y1="{top + HEAD - 4}" y2="{floor - 2}"/>'
            f'<text class="tick" x="{x}" y="{floor + 9}" text-anchor="middle">{tick}</text>'
        )
    for number, bar in enumerate(chart.bars):
        y = top + HEAD + number * (ROW + GAP)
        length = wide * bar.value / end
        ink = next((c for name, c in _INK.items() if bar.label.startswith(name)), _OTHERS)
        low, high = (LEFT + wide * min(1.0, each / end) for each in (bar.low, bar.high))
        after = max(LEFT + length, high) + 8
        middle = y + ROW / 2
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 17}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{ROW}" fill="{ink}"/>',
            f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>',
            f'<text x="{after:.1f}" y="{y + 17}">{bar.value:.3g}</text>',
        ]
    return parts
