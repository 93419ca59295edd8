"""What several workers show, as one: metrics summed up, live requests side by side.

Merged as exported, by families of Prometheus' text format, so that nothing here depends on how a
worker counts. Counters and histograms add up, and what a worker counted before it ended stays
counted: a total that shrank would look like a restart to Prometheus, and be added again.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

LARGEST: Final = frozenset(
    {
        "redmesh_proxy_ledger_away",
        "redmesh_proxy_ledger_away_seconds",
        "redmesh_proxy_ready_replicas",
        "redmesh_proxy_table_version",
    }
)
"""Gauges that every worker knows of the same thing; all others add up."""
_CREATED: Final = "_created"
"""Since when something is counted: the earliest."""
_LASTING: Final = frozenset({"counter", "histogram"})

Page = Sequence[Metric]
"""The families that one worker exports."""


def read_page(text: str) -> Page:
    """Parse Prometheus' text format; raises ValueError."""
    return list(text_string_to_metric_families(text))


def merge_pages(pages: Iterable[Page]) -> Page:
    """Merge the families of several workers."""
    families: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, frozenset[tuple[str, str]]], Sample]] = {}
    for page in pages:
        for family in page:
            if family.name not in families:
                families[family.name] = Metric(family.name, family.documentation, family.type)
                values[family.name] = {}
            merged = values[family.name]
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                known = merged.get(key)
                merged[key] = sample if known is None else _both(family.name, known, sample)
    for name, family in families.items():
        family.samples = list(values[name].values())
    return list(families.values())


def lasting(page: Page) -> Page:
    """Give what outlives the worker that counted it: counters and histograms, and their dates."""
    return [family for family in page if family.type in _LASTING or family.name.endswith(_CREATED)]


def show_page(page: Page) -> bytes:
    """Write Prometheus' text format."""
    return generate_latest(_Shown(page))


def _both(family: str, one: Sample, other: Sample) -> Sample:
    if family.endswith(_CREATED):
        value = min(one.value, other.value)
    elif family in LARGEST:
        value = max(one.value, other.value)
    else:
        value = one.value + other.value
    return one._replace(value=value)


class _Shown(Collector):
    def __init__(self, page: Page) -> None:
        self._page = page

    def collect(self) -> Iterable[Metric]:
        return self._page


class LivePage(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker answers on `/live/requests`."""

    proxy: str
    requests: dict[str, dict[str, dict[str, Any]]]
    table: dict[str, dict[str, Any]]
    breaker: str


class MergedLivePage(LivePage, frozen=True, kw_only=True):
    """What the parent answers: requests are named `<worker>/<request>`."""

    workers: list[str]


def merge_live(proxy: str, pages: Sequence[LivePage]) -> MergedLivePage:
    """Put the live requests of several workers side by side; of tables, show the newest."""
    requests: dict[str, dict[str, dict[str, Any]]] = {}
    table: dict[str, dict[str, Any]] = {}
    for page in pages:
        for model, carried in page.requests.items():
            named = {f"{page.proxy}/{request}": live for request, live in carried.items()}
            requests.setdefault(model, {}).update(named)
        for model, known in page.table.items():
            if model not in table or known["ver"] > table[model]["ver"]:
                table[model] = known
    return MergedLivePage(
        proxy=proxy,
        requests=requests,
        table=table,
        breaker="open" if any(page.breaker == "open" for page in pages) else "closed",
        workers=[page.proxy for page in pages],
    )
