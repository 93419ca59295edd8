"""The proxy's own counters and histograms show what the client library's would have shown."""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram

from services.proxy.tally import Spreads, Tallies

BOUNDS = (0.5, 1.0, 2.5)


def shown(registry: CollectorRegistry) -> set[str]:
    """Give the lines that are scraped, without the library's times of creation."""
    lines = prometheus_client.generate_latest(registry).decode().splitlines()
    return {line for line in lines if "_created" not in line}


def test_the_same_as_the_library() -> None:
    """Names, labels, buckets, bounds and sums are those of the client library."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    count = Tallies("x_requests", "Requests.", ("model",), ours)
    time = Spreads("x_seconds", "Time.", ("model",), ours, bounds=BOUNDS)
    their_count = Counter("x_requests", "Requests.", ("model",), registry=theirs)
    their_time = Histogram("x_seconds", "Time.", ("model",), registry=theirs, buckets=BOUNDS)
    for model in ("a", 'b"\n'):
        count.labels(model).inc()
        their_count.labels(model).inc()
        count.labels(model).inc(41)
        their_count.labels(model).inc(41)
        for value in (0.0, 0.5, 0.500001, 1.0, 2.0, 2.5, 99.0):
            time.labels(model).observe(value)
            their_time.labels(model).observe(value)
    assert shown(ours) == shown(theirs)


def test_a_child_is_made_once() -> None:
    """The same label values give the same child, so that it can be kept."""
    family = Tallies("x", "X.", ("a", "b"), CollectorRegistry())
    assert family.labels("1", "2") is family.labels("1", "2")
    assert family.labels("1", "2") is not family.labels("2", "1")
