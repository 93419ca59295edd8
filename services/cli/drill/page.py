"""The report as one HTML file for a browser, without anything from elsewhere. Pure.

Written for somebody who did not see the drill: the verdict first, then what was done and expected,
then expected against seen, then what it looked like for clients, and at last what happened when.
"""

from collections.abc import Iterator
from html import escape
from typing import Final

from services.cli.drill.chart import Line, Series, axis, chart
from services.cli.drill.report import Report, headline
from services.cli.drill.told import WHY

_STYLE: Final = """
:root { color-scheme: light; --ink: #1d2433; --soft: #667085; --line: #e4e7ec; --good: #12805c;
  --bad: #c62828; --warn: #b26a00; --blue: #2f6fde; --violet: #7a5af8; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink);
  background: #f6f7f9; margin: 0; padding: 32px 16px; }
main { max-width: 1000px; margin: 0 auto; }
header, section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 28px; margin-bottom: 16px; }
header { border-left: 8px solid var(--good); }
header.missed { border-left-color: var(--bad); }
h1 { font-size: 24px; margin: 0; display: flex; gap: 14px; align-items: center; }
h2 { font-size: 16px; margin: 0 0 12px; }
.verdict { font-size: 14px; letter-spacing: .04em; color: #fff; background: var(--good);
  border-radius: 6px; padding: 3px 12px; white-space: nowrap; }
.missed .verdict { background: var(--bad); }
.headline { font-size: 18px; margin: 10px 0 0; }
.meta { color: var(--soft); font-size: 13px; margin: 8px 0 0; }
dl { display: grid; grid-template-columns: 110px 1fr; gap: 8px 16px; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: 13px;
  padding: 0 12px 6px 0; }
td { border-top: 1px solid var(--line); padding: 9px 12px 9px 0; vertical-align: top; }
td.seen { white-space: nowrap; font-variant-numeric: tabular-nums; font-weight: 600; }
td .why { color: var(--soft); font-size: 13px; display: block; }
.ok { color: var(--good); font-weight: 600; white-space: nowrap; }
.no { color: var(--bad); font-weight: 600; white-space: nowrap; }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg .title { font-weight: 600; fill: var(--ink); font-size: 13px; }
svg .unit { font-weight: 400; fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--line); }
svg .felt { fill: #fde8e8; }
svg .mark { stroke-width: 2; } svg .mark.fault { stroke: var(--bad); }
svg .mark.heal { stroke: var(--warn); } svg .mark.recovered { stroke: var(--good); }
svg .name { font-weight: 600; paint-order: stroke; stroke: #fff; stroke-width: 4px; }
svg .name.fault { fill: var(--bad); }
svg .name.heal { fill: var(--warn); } svg .name.recovered { fill: var(--good); }
svg rect.good { fill: #5cb592; } svg rect.bad { fill: var(--bad); }
svg polyline { fill: none; stroke-width: 2; } svg polygon.under { stroke: none; opacity: .14; }
svg .tokens { stroke: var(--blue); } svg polygon.tokens { fill: var(--blue); }
svg .ttft { stroke: var(--warn); } svg polygon.ttft { fill: var(--warn); }
svg .flight { stroke: var(--violet); } svg polygon.flight { fill: var(--violet); }
.log td { padding: 4px 12px 4px 0; font-size: 14px; }
.log td:first-child { color: var(--soft); text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; width: 70px; }
.log .event { color: var(--soft); }
@media print { body { background: #fff; padding: 0; } header, section { break-inside: avoid; } }
"""

_EVENTS: Final = 60


def html(report: Report) -> str:
    """Write the page."""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Drill {escape(report.drill)}</title><style>{_STYLE}</style></head>",
            "<body><main>",
            *_head(report),
            *_story(report),
            *_checks(report),
            *_charts(report),
            *_log(report),
            "</main></body></html>",
        ]
    )


def _head(report: Report) -> Iterator[str]:
    passed = report.verdict.passed
    yield f'<header class="{"" if passed else "missed"}">'
    yield f"<h1>Drill: {escape(report.drill)}"
    yield f'<span class="verdict">{"PASSED" if passed else "BUDGET MISSED"}</span></h1>'
    yield f'<p class="headline">{escape(headline(report))}.</p>'
    yield (
        f'<p class="meta">{escape(report.started)} · {report.length_s:g} s · '
        f"{escape(report.mesh)} · redmesh {escape(report.version)}</p></header>"
    )


def _story(report: Report) -> Iterator[str]:
    yield "<section><h2>What was rehearsed</h2><dl>"
    for name, text in (
        ("Fault", report.what),
        ("In detail", report.struck),
        ("Expected", report.expects),
        ("Load", report.load),
    ):
        yield f"<dt>{name}</dt><dd>{escape(text)}</dd>"
    yield "</dl></section>"


def _checks(report: Report) -> Iterator[str]:
    yield "<section><h2>Expected and seen</h2><table>"
    yield "<tr><th></th><th>Expected</th><th>Seen</th></tr>"
    for check in report.verdict.checks:
        mark = '<td class="ok">✓ kept</td>' if check.passed else '<td class="no">✗ missed</td>'
        why = WHY.get(check.name, "")
        yield (
            f"<tr>{mark}<td>{escape(check.expected)}"
            f'<span class="why">{escape(why)}</span></td>'
            f'<td class="seen">{escape(check.seen)}</td></tr>'
        )
    yield "</table></section>"


def _lines(report: Report) -> list[Line]:
    seen = report.seen
    lines = [Line(at_s=seen.fault_s, kind="fault", text="fault")]
    if seen.heal_s > seen.fault_s + 0.5:
        lines.append(Line(at_s=seen.heal_s, kind="heal", text="fault over"))
    if seen.recovered_s is not None:
        lines.append(Line(at_s=seen.recovered_s, kind="recovered", text=report.recovery))
    return lines


def _charts(report: Report) -> Iterator[str]:
    seconds = report.seconds
    yield "<section><h2>What clients saw, second by second</h2>"
    if not seconds:
        yield "<p>There was no traffic.</p></section>"
        return
    lines = _lines(report)
    length_s = float(max(len(seconds), seconds[-1].at_s + 1))
    yield axis(lines, length_s)
    stacked = tuple(float(each.requests + each.failed) for each in seconds)
    failed = tuple(float(each.failed) for each in seconds)
    for title, unit, series in (
        (
            "Requests finished",
            "each second; red: failed or broken",
            (
                Series(values=stacked, kind="good", bars=True),
                Series(values=failed, kind="bad", bars=True),
            ),
        ),
        (
            "Tokens",
            "each second",
            (Series(values=tuple(float(each.tokens) for each in seconds), kind="tokens"),),
        ),
        (
            "Time to first token",
            "median, milliseconds",
            (Series(values=tuple(each.ttft_ms for each in seconds), kind="ttft"),),
        ),
        (
            "In flight",
            "requests",
            (Series(values=tuple(float(each.in_flight) for each in seconds), kind="flight"),),
        ),
    ):
        yield chart(title, unit, series, lines, length_s)
    yield "</section>"


def _log(report: Report) -> Iterator[str]:
    yield '<section><h2>What happened, in seconds since the drill began</h2><table class="log">'
    shown = [mark for mark in report.marks if mark.kind != "event"]
    events = [mark for mark in report.marks if mark.kind == "event"]
    for mark in sorted([*shown, *events[:_EVENTS]], key=lambda each: each.at_s):
        kind = "event" if mark.kind == "event" else ""
        name = "" if kind else f"<strong>{escape(mark.kind)}</strong> "
        yield (
            f'<tr><td>{mark.at_s:.2f}</td><td class="{kind}">{name}{escape(mark.text)}</td></tr>'
        )
    if len(events) > _EVENTS:
        yield f"<tr><td></td><td>… and {len(events) - _EVENTS} more events, in the JSON</td></tr>"
    for detail in report.seen.traffic.details:
        yield f"<tr><td></td><td>failed: {escape(detail)}</td></tr>"
    yield "</table></section>"
