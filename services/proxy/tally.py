"""Counters and histograms that cost nanoseconds, shown in Prometheus' format.

The client library's own take a lock and walk the buckets: microseconds for each of the half dozen
figures that a request leaves behind. A proxy counts in one thread, so an addition will do. A child
(`labels`) is made once per model and kept by who counts; `collect` reads them all when asked.
"""

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Final, Generic, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Tally:
    """One count."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0
        """It only grows; where a call would cost too much, whoever counts adds to it."""

    def inc(self, amount: float = 1.0) -> None:
        """Count `amount` more."""
        self.value += amount


class Spread:
    """One histogram."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Observations per bucket, not accumulated; the last one has no upper bound."""
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one observation; a bucket's upper bound belongs to it."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


C = TypeVar("C")


class _Family(Collector, Generic[C]):
    """A metric with its children by label values."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], registry: CollectorRegistry
    ) -> None:
        self._name: Final = name
        self._text: Final = text
        self._labels: Final = labels
        self._children: dict[tuple[str, ...], C] = {}
        registry.register(self)

    def labels(self, *values: str) -> C:
        """Give the child with these label values; keep it, and nothing is looked up again."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._make()
        return child

    @abstractmethod
    def _make(self) -> C: ...


class Tallies(_Family[Tally]):
    """A counter."""

    def _make(self) -> Tally:
        return Tally()

    def collect(self) -> Iterable[Metric]:
        """Show every count."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, child in self._children.items():
            family.add_metric(values, child.value)
        yield family


class Spreads(_Family[Spread]):
    """A histogram with the same buckets for all its children."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        registry: CollectorRegistry,
        *,
        bounds: Sequence[float],
    ) -> None:
        self._bounds = tuple(bounds)
        self._edges = (*(str(float(bound)) for bound in bounds), "+Inf")
        super().__init__(name, text, labels, registry)

    def _make(self) -> Spread:
        return Spread(self._bounds)

    def collect(self) -> Iterable[Metric]:
        """Show every histogram, its buckets accumulated."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, child in self._children.items():
            buckets = list(zip(self._edges, map(float, accumulate(child.counts)), strict=True))
            family.add_metric(values, buckets, child.total)
        yield family
