"""The comparison as an SVG: for each trace a row of bars per policy, for three figures."""

from collections.abc import Callable, Sequence
from typing import Final
from xml.sax.saxutils import escape

from tests.routing.judging import DEFAULT, REFERENCE
from tests.routing.report import Result
from tests.routing.run import Outcome

LABELS_PX: Final = 230
PANEL_PX: Final = 200
GAP_PX: Final = 74
ROW_PX: Final = 22
HEAD_PX: Final = 58
MARGIN_PX: Final = 16

FIGURES: Final[tuple[tuple[str, Callable[[Outcome], float], Callable[[float], str]], ...]] = (
    ("TTFT p99, less is better", lambda one: one.ttft_p99_s, lambda value: f"{value:.2f} s"),
    ("goodput", lambda one: one.goodput, lambda value: f"{value:.1%}"),
    ("prompt tokens found in cache", lambda one: one.hit_rate, lambda value: f"{value:.1%}"),
)


def drawn(results: Sequence[Result]) -> str:
    """Draw all traces, one below the other."""
    width = MARGIN_PX * 2 + LABELS_PX + len(FIGURES) * (PANEL_PX + GAP_PX)
    parts: list[str] = []
    top = MARGIN_PX
    for result in results:
        parts += _trace(result, top)
        top += HEAD_PX + ROW_PX * len(result.outcomes) + MARGIN_PX
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" width="{width}" '
        f'height="{top}" font-family="system-ui, sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{top}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _trace(result: Result, top: int) -> list[str]:
    title = f"{result.trace} at {result.utilization:.0%} of the fleet's capacity"
    parts = [_text(MARGIN_PX, top + 14, title, weight="600", size=14)]
    rows = top + HEAD_PX
    for number, name in enumerate(result.outcomes):
        weight = "600" if name == DEFAULT else "400"
        end = MARGIN_PX + LABELS_PX - 10
        parts.append(_text(end, rows + number * ROW_PX + 14, name, weight=weight, anchor="end"))
    for column, (caption, value_of, written) in enumerate(FIGURES):
        left = MARGIN_PX + LABELS_PX + column * (PANEL_PX + GAP_PX)
        parts.append(_text(left, top + 42, caption, colour="#52606d"))
        values = {name: value_of(one) for name, one in result.outcomes.items()}
        most = max(1e-9, *values.values())
        # One policy that is far off would leave nothing to see of the others.
        limit = min(most, 2.5 * values.get(REFERENCE, most)) if column == 0 else most
        for number, (name, value) in enumerate(values.items()):
            y = rows + number * ROW_PX
            length = round(PANEL_PX * min(1.0, value / limit), 1)
            colour = "#0b7285" if name == DEFAULT else "#adb5bd"
            parts.append(
                f'<rect x="{left}" y="{y + 3}" width="{length}" height="{ROW_PX - 7}" '
                f'fill="{colour}"/>'
            )
            if value > limit:
                x = left + PANEL_PX - 14
                parts.append(
                    f'<path d="M{x} {y + 1} l-6 {ROW_PX - 3} h5 l6 -{ROW_PX - 3} z" fill="#fff"/>'
                )
            parts.append(_text(left + length + 5, y + 14, written(value)))
    return parts


def _text(
    x: float,
    y: float,
    text: str,
    *,
    weight: str = "400",
    anchor: str = "start",
    size: int = 12,
    colour: str = "#1f2933",
) -> str:
    return (
        f'<text x="{x}" y="{y}" font-weight="{weight}" text-anchor="{anchor}" '
        f'font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )
