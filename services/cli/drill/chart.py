"""Charts of a drill as inline SVG: one quantity over the seconds of the run, with its marks. Pure.

All charts of a page have one time axis, so that an eye can go straight down from the fault.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import Final

import msgspec

WIDTH: Final = 920
HEIGHT: Final = 132
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 26, 20
_STEPS: Final = (1, 2, 5)


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A vertical line at a moment."""

    at_s: float
    kind: str
    """CSS class: `fault`, `heal`, `recovered`."""
    text: str


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One value for each second; None where there is none."""

    values: tuple[float | None, ...]
    kind: str
    """CSS class: `good`, `bad`, `ttft`, `flight`."""
    bars: bool = False


def chart(
    title: str, unit: str, series: Sequence[Series], lines: Sequence[Line], length_s: float
) -> str:
    """Draw one chart."""
    top = nice(max((v for s in series for v in s.values if v is not None), default=0.0))
    name = escape(title)
    label = f'{name}<tspan class="unit" dx="8">{escape(unit)}</tspan>'
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">',
        f'<text class="title" x="{LEFT}" y="15">{label}</text>',
        *_grid(top, length_s),
        *_felt(lines, length_s),
    ]
    for each in series:
        parts += _bars(each, top, length_s) if each.bars else _area(each, top, length_s)
    for line in lines:
        x = _x(line.at_s, length_s)
        parts.append(
            f'<line class="mark {line.kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" '
            f'y2="{HEIGHT - BOTTOM}"><title>{escape(line.text)}</title></line>'
        )
    return "\n".join([*parts, "</svg>"])


def axis(lines: Sequence[Line], length_s: float) -> str:
    """Draw the names of the marks, in rows so that none covers another."""
    rows: list[float] = []
    strokes: list[str] = []
    names: list[str] = []
    for line in sorted(lines, key=lambda each: each.at_s):
        x = _x(line.at_s, length_s)
        text = f"{line.text} ({line.at_s:.1f} s)"
        wide = len(text) * 6.6
        left = x + wide > WIDTH - RIGHT
        start = x - wide if left else x
        row = next((n for n, end in enumerate(rows) if end < start - 6), len(rows))
        rows[row:] = [*([max(x, start + wide)]), *rows[row + 1 :]]
        anchor = "end" if left else "start"
        y = 14 + 18 * row
        strokes.append(
            f'<line class="mark {line.kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 11}" y2="100%"/>'
        )
        names.append(
            f'<text class="name {line.kind}" x="{x + (-4 if left else 4):.1f}" y="{y}" '
            f'text-anchor="{anchor}">{escape(text)}</text>'
        )
    height = 8 + 18 * max(1, len(rows))
    drawn = "".join([*strokes, *names])  # names last, so that no line runs through one
    return f'<svg viewBox="0 0 {WIDTH} {height}">{drawn}</svg>'


def nice(value: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten, so that an axis ends at a round number."""
    if value <= 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in _STEPS if step * power >= value), 10 * power)


def _x(at_s: float, length_s: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * min(1.0, max(0.0, at_s / max(length_s, 1.0)))


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(1.0, value / top)


def _grid(top: float, length_s: float) -> list[str]:
    parts: list[str] = []
    for share in (0.0, 0.5, 1.0):
        y = _y(top * share, top)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">'
            f"{top * share:g}</text>"
        )
    step = max(1, int(nice(length_s / 10)))
    for second in range(0, int(length_s) + 1, step):
        x = _x(second, length_s)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 4}" text-anchor="middle">'
            f"{second} s</text>"
        )
    return parts


def _felt(lines: Sequence[Line], length_s: float) -> list[str]:
    """Shade the time from the fault to the recovery."""
    at_s = {line.kind: line.at_s for line in lines}
    if "fault" not in at_s:
        return []
    x = _x(at_s["fault"], length_s)
    wide = _x(at_s.get("recovered", length_s), length_s) - x
    rect = (
        f'<rect class="felt" x="{x:.1f}" y="{TOP}" width="{max(0.0, wide):.1f}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/>'
    )
    return [rect]


def _bars(series: Series, top: float, length_s: float) -> list[str]:
    wide = max(1.0, _x(1, length_s) - _x(0, length_s) - 1)
    return [
        f'<rect class="{series.kind}" x="{_x(second, length_s):.1f}" y="{_y(value, top):.1f}" '
        f'width="{wide:.1f}" height="{HEIGHT - BOTTOM - _y(value, top):.1f}">'
        f"<title>second {second}: {value:g}</title></rect>"
        for second, value in enumerate(series.values)
        if value
    ]


def _area(series: Series, top: float, length_s: float) -> list[str]:
    """Draw a line through the middle of each second, with the area under it; gaps stay gaps."""
    parts: list[str] = []
    run: list[tuple[float, float]] = []
    for second, value in enumerate([*series.values, None]):
        if value is not None:
            run.append((_x(second + 0.5, length_s), _y(value, top)))
            continue
        if run:
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
            floor = HEIGHT - BOTTOM
            parts.append(
                f'<polygon class="{series.kind} under" points="{run[0][0]:.1f},{floor} {points} '
                f'{run[-1][0]:.1f},{floor}"/>'
            )
            parts.append(f'<polyline class="{series.kind}" points="{points}"/>')
            run = []
    return parts
