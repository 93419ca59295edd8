"""One drill's report: all that the text, JSON and HTML forms show. Pure data."""

import msgspec

from services.cli.drill.records import Budget, Mark, Second, Seen, Verdict


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was rehearsed, what was expected, what was seen, and the verdict."""

    drill: str
    what: str
    """The fault in a sentence."""
    expects: str
    recovery: str
    """What the drill waited for."""
    struck: str
    """What exactly was struck, and how."""
    model: str
    mesh: str
    """How large the mesh was."""
    load: str
    version: str
    started: str
    """When, in ISO 8601 with the zone."""
    length_s: float
    budget: Budget
    verdict: Verdict
    seen: Seen
    seconds: tuple[Second, ...]
    marks: tuple[Mark, ...]


def headline(report: Report) -> str:
    """Say in one line what came of it."""
    traffic = report.seen.traffic
    lost = traffic.failed + traffic.broken
    kept = f"{traffic.ok} of {traffic.count} requests were answered well"
    if report.verdict.passed:
        return f"{kept}; " + ("nothing was lost" if lost == 0 else "what was lost was expected")
    missed = ", ".join(check.name for check in report.verdict.checks if not check.passed)
    return f"{kept}; missed: {missed}"
