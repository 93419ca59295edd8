"""The report as text, for a terminal: what was done, what was expected, what was seen. Pure."""

from collections.abc import Iterator, Sequence
from typing import Final

from services.cli.drill.records import Check
from services.cli.drill.report import Report, headline

_BARS: Final = "▁▂▃▄▅▆▇█"
_SHOWN: Final = 12
"""Events that the text names; the JSON has all."""

WHY: Final = {
    "fault": "A fault that nobody can see has not been rehearsed, whatever else was kept.",
    "traffic": "A drill without traffic proves nothing.",
    "failed": "Requests that got an error before a single byte of an answer.",
    "broken": "Answers that had begun and were cut, ended early, or had another text than without "
    "the fault.",
    "resent": "Requests that clients had to send again, because their proxy did not answer.",
    "recover": "How long the fault could be felt.",
    "whole": "All replicas, proxies, agents and controllers are there again, as declared.",
    "exact": "What the ledger says is running, what the proxies relay and what the engines "
    "compute are the same.",
    "drift": "Differences between ledger, proxies and engines after everything.",
    "left": "Requests that the ledger believes to run although none does: a leak of capacity.",
    "trespass": "Two leaders at once could undo each other's work.",
}
"""Check → what it means, for somebody who reads this for the first time."""


def lines(report: Report) -> Iterator[str]:
    """Write the report."""
    verdict = "PASSED" if report.verdict.passed else "MISSED ITS BUDGET"
    yield f"Drill {report.drill}: {verdict}"
    yield f"  {headline(report)}"
    yield ""
    yield f"What was done   {report.what}"
    yield f"                {report.struck}"
    yield f"Expected        {report.expects}"
    yield f"Mesh            {report.mesh}"
    yield f"Load            {report.load}"
    yield ""
    yield from _table(report.verdict.checks)
    yield ""
    yield from _traffic(report)
    yield ""
    yield "What happened, in seconds since the drill began"
    shown = [mark for mark in report.marks if mark.kind != "event"]
    events = [mark for mark in report.marks if mark.kind == "event"]
    for mark in sorted(shown + events[:_SHOWN], key=lambda each: each.at_s):
        yield f"  {mark.at_s:7.2f}  {mark.kind if mark.kind != 'event' else '·':<9}  {mark.text}"
    if len(events) > _SHOWN:
        yield f"           … and {len(events) - _SHOWN} more events, in the JSON"


def _table(checks: Sequence[Check]) -> Iterator[str]:
    widths = [max(len(each.expected) for each in checks), max(len(each.seen) for each in checks)]
    yield f"          {'EXPECTED':<{widths[0]}}  SEEN"
    for check in checks:
        mark = "ok      " if check.passed else "MISSED  "
        yield f"  {mark}{check.expected:<{widths[0]}}  {check.seen}"
        if not check.passed:
            yield f"          {WHY.get(check.name, '')}"


def _traffic(report: Report) -> Iterator[str]:
    seconds, seen = report.seconds, report.seen
    if not seconds:
        return
    tokens = [each.tokens for each in seconds]
    strikes = int(seen.fault_s)
    yield f"Tokens each second (at most {max(tokens)}); the fault struck at ^"
    yield f"  {bars(tokens)}"
    yield f"  {' ' * min(strikes, len(tokens) - 1)}^"
    for when, values in (
        ("before the fault", seen.traffic.ttft_before_ms),
        ("after the fault", seen.traffic.ttft_after_ms),
    ):
        if values is not None:
            yield (
                f"Time to first byte {when}: median {values[0]:.0f} ms, "
                f"99th percentile {values[1]:.0f} ms"
            )
    if seen.traffic.driven:
        yield f"Longest wait of a client since the fault: {seen.traffic.longest_gap_s:.2f} s"
    for detail in seen.traffic.details:
        yield f"  {detail}"


def bars(values: Sequence[int]) -> str:
    """Draw one bar for each value."""
    top = max(values, default=0)
    if top == 0:
        return _BARS[0] * len(values)
    return "".join(_BARS[min(7, value * 8 // (top + 1))] for value in values)
