"""What a comparison found, as figures and as a table."""

import msgspec

from tests.routing.run import Outcome, Scenario


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """All policies on one trace."""

    trace: str
    utilization: float
    capacity_per_s: float
    """Requests per second that the fleet ends when all are offered at once."""
    scenario: Scenario
    outcomes: dict[str, Outcome]


def table(result: Result) -> str:
    """Write a table for a terminal or a page."""
    scenario = result.scenario
    speeds = "known" if scenario.speeds_known else "unknown"
    told = (
        f"{result.trace}: {len(scenario.speeds)} replicas (speeds {speeds}), {scenario.proxies} "
        f"proxies, {result.utilization:.0%} of {result.capacity_per_s:.1f} requests/s"
    )
    lines = [
        "",
        told,
        "",
        "| policy | TTFT p50 | TTFT p99 | goodput | cache hits | imbalance |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {one.ttft_p50_s:.3f} s | {one.ttft_p99_s:.2f} s | {one.goodput:.1%} "
        f"| {one.hit_rate:.1%} | {one.imbalance:.2f} |"
        for name, one in result.outcomes.items()
    ]
    return "\n".join(lines) + "\n"
