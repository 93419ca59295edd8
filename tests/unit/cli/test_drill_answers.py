"""The strict judge of one stream, and what becomes of traffic on the time line."""

from typing import Any

import msgspec
import pytest

from services.cli.drill.answers import judge
from services.cli.drill.live import Page
from services.cli.drill.records import Outcome, Request
from services.cli.drill.timeline import Counts, grown, second_of, seconds_of

DONE = b"data: [DONE]\n\n"


def event(content: str | None = None, finish: str | None = None, **more: object) -> bytes:
    """Write one event of a chat stream."""
    choice = {"delta": {"content": content}, "finish_reason": finish}
    return b"data: " + msgspec.json.encode({"choices": [choice], **more}) + b"\n\n"


USAGE = b'data: {"choices":[],"usage":{"completion_tokens":2}}\n\n'
GOOD = event("Hel") + event("lo", "length") + USAGE + DONE


@pytest.mark.parametrize(
    ("status", "body", "whole", "outcome"),
    [
        (200, GOOD, True, Outcome.OK),
        (200, GOOD, False, Outcome.RESET),
        (503, b'{"error":{}}', True, Outcome.STATUS),
        (200, event("Hel") + event("lo", "length") + USAGE, True, Outcome.TRUNCATED),
        (200, event("Hel") + event("lo") + USAGE + DONE, True, Outcome.TRUNCATED),
        (200, event("Hel") + event("lo", "stop") + USAGE + DONE, True, Outcome.TRUNCATED),
        (200, event("Hello", "length") + DONE, True, Outcome.TRUNCATED),
        (200, b"", True, Outcome.TRUNCATED),
        (200, event("Hel") + b'data: {"error":{"message":"gone"}}\n\n', True, Outcome.ERROR_EVENT),
        (200, event("Hell") + event("o!", "length") + USAGE + DONE, True, Outcome.DIFFERENT),
        (200, event("H") + event("lo", "length") + USAGE + DONE, True, Outcome.DIFFERENT),
        (200, b"data: {\n\n" + DONE, True, Outcome.MALFORMED),
        (200, b"<html>\n\n", True, Outcome.MALFORMED),
        (200, GOOD + b"data: ", True, Outcome.MALFORMED),
    ],
)
def test_only_a_whole_stream_of_the_right_text_is_good(
    status: int, body: bytes, whole: object, outcome: Outcome
) -> None:
    """Anything that is cut, short, different or an error is a failure of its own kind."""
    assert judge(status, body, whole=bool(whole), tokens=2, reference="Hello").outcome is outcome


def test_without_a_reference_texts_are_not_compared() -> None:
    """Where texts cannot be compared, everything else still is."""
    other = event("Goodbye", "length") + USAGE + DONE
    assert judge(200, other, whole=True, tokens=2, reference=None).outcome is Outcome.OK
    assert judge(200, other, whole=True, tokens=3, reference=None).outcome is Outcome.TRUNCATED


def request(**fields: Any) -> Request:  # noqa: ANN401 - fields of the struct
    """Make a good request."""
    return Request(outcome=fields.pop("outcome", Outcome.OK), proxy="p", **fields)


def test_each_second_shows_what_happened_in_it() -> None:
    """Requests are counted where they end, waits where they end, and in flight at its end."""
    seconds = seconds_of(
        [
            request(began_s=0.2, first_s=0.3, ended_s=1.5),
            request(began_s=0.4, first_s=0.7, ended_s=2.5),
            request(began_s=0.9, first_s=None, ended_s=1.1, outcome=Outcome.REFUSED),
        ],
        {0: 3, 2: 4},
        3.2,
    )
    assert [each.requests for each in seconds] == [0, 1, 1]
    assert [each.failed for each in seconds] == [0, 1, 0]
    assert [each.tokens for each in seconds] == [3, 0, 4]
    assert [each.in_flight for each in seconds] == [3, 1, 0]
    assert seconds[0].ttft_ms == pytest.approx(200)
    assert seconds[1].ttft_ms is None


METRICS = """\
redmesh_proxy_requests_total{model="m",outcome="2xx"} 5.0
redmesh_proxy_requests_total{model="m",outcome="5xx"} 1.0
redmesh_proxy_requests_total{model="other",outcome="2xx"} 7.0
redmesh_proxy_requests_total{model="m",outcome="cut"} 2.0
redmesh_proxy_in_flight{model="m"} 4.0
redmesh_proxy_stream_events_total{model="m"} 1e+02
redmesh_proxy_first_byte_seconds_count{model="m"} 4.0
redmesh_proxy_first_byte_seconds_sum{model="m"} 0.2
redmesh_proxy_ledger_away{model="m"} 1.0
"""


def test_live_traffic_is_read_from_metrics() -> None:
    """Counters of the model, and of no other, make the seconds of live traffic."""
    page = Page(METRICS, "m")
    assert page.away
    growth = grown(Counts(ok=3, tokens=40), page.counts)
    second = second_of(7, [growth])
    assert (second.requests, second.failed, second.tokens, second.in_flight) == (2, 3, 60, 4)
    assert second.ttft_ms == pytest.approx(50)
    assert not Page(METRICS, "other").away


def test_a_proxy_that_began_anew_counts_from_zero() -> None:
    """Counters that fell belong to a new process: all of what it counted is new."""
    growth = grown(Counts(ok=50, tokens=900), Counts(ok=4, tokens=30))
    assert (growth.ok, growth.tokens) == (4, 30)
    assert grown(None, Counts(ok=50)).ok == 0
