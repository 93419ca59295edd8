"""What the default policy must keep: its lead over what a plain load balancer does."""

from typing import Final

from tests.routing.report import Result

REFERENCE: Final = "least connections, own"
DEFAULT: Final = "least tokens, exact + affinity"
TTFT_P99_AT_MOST: Final = 0.7
"""p99 of the time to first token, against per-proxy least connections."""
GOODPUT_AHEAD_AT_MOST: Final = 1.03
"""No other policy may have more goodput than this times the default's."""


def faults(result: Result) -> list[str]:
    """Name what is missed on one trace; a policy that did not run is not judged."""
    outcomes = result.outcomes
    default, reference = outcomes.get(DEFAULT), outcomes.get(REFERENCE)
    if default is None or reference is None:
        return []
    found: list[str] = []
    ratio = default.ttft_p99_s / reference.ttft_p99_s
    if ratio > TTFT_P99_AT_MOST:
        found.append(
            f"{result.trace}: p99 TTFT is {ratio:.2f} of {REFERENCE}'s, at most {TTFT_P99_AT_MOST}"
        )
    for name, outcome in outcomes.items():
        ahead = outcome.goodput / max(1e-9, default.goodput)
        if ahead > GOODPUT_AHEAD_AT_MOST:
            found.append(
                f"{result.trace}: {name} has {ahead:.3f} × the goodput of {DEFAULT}, "
                f"at most {GOODPUT_AHEAD_AT_MOST}"
            )
    return found
