"""Watches the traffic there is through the proxies' own metrics, once a second. Drives nothing."""

import asyncio
import re
from collections.abc import Sequence
from typing import Final

from services.cli.drill.records import Second
from services.cli.drill.timeline import Counts, added, grown, second_of
from services.cli.observing import ADMIN_DEADLINE_S
from shared import admin
from shared.models.host import Member

_LINE: Final = re.compile(
    r"^redmesh_proxy_(requests_total|in_flight|stream_events_total|first_byte_seconds_sum"
    r"|first_byte_seconds_count|ledger_away|retries_total|stream_failovers_total)"
    r"\{([^}]*)\} ([0-9.e+-]+)$",
    re.MULTILINE,
)
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Page:
    """One proxy's metrics of one model."""

    def __init__(self, text: str, model: str) -> None:
        found: dict[tuple[str, str], float] = {}
        for name, labels, value in _LINE.findall(text):
            named = dict(_LABEL.findall(labels))
            if named.get("model") == model:
                outcome = named.get("outcome", "") if name == "requests_total" else ""
                found[name, outcome] = found.get((name, outcome), 0.0) + float(value)
        self.away = found.get(("ledger_away", ""), 0.0) > 0
        """It does without the ledger now."""
        self.counts = Counts(
            ok=found.get(("requests_total", "2xx"), 0.0),
            failed=found.get(("requests_total", "5xx"), 0.0),
            broken=found.get(("requests_total", "cut"), 0.0),
            tokens=found.get(("stream_events_total", ""), 0.0),
            first_bytes=found.get(("first_byte_seconds_count", ""), 0.0),
            first_byte_s=found.get(("first_byte_seconds_sum", ""), 0.0),
            in_flight=found.get(("in_flight", ""), 0.0),
            moved=found.get(("retries_total", ""), 0.0)
            + found.get(("stream_failovers_total", ""), 0.0),
        )


async def page(proxy: Member, model: str) -> Page | None:
    """Read a proxy's metrics; None when it does not answer."""
    try:
        body = await admin.fetch(f"{proxy.admin_url}/metrics", deadline_s=ADMIN_DEADLINE_S)
    except (OSError, ValueError):
        return None
    return Page(body.decode(errors="replace"), model)


class Live:
    """The traffic of all proxies, by differences of their counters."""

    def __init__(self) -> None:
        self._last: dict[str, Counts] = {}
        self.total = Counts()
        self.seconds: list[Second] = []

    def take(self, at_s: int, pages: dict[str, Page | None]) -> None:
        """Take one reading of every proxy into account."""
        growth: list[Counts] = []
        for name, read in pages.items():
            if read is None:
                continue
            grew = grown(self._last.get(name), read.counts)
            self._last[name] = read.counts
            self.total = added(self.total, grew)
            growth.append(grew)
        self.seconds.append(second_of(at_s, growth))


async def pages(proxies: Sequence[Member], model: str) -> dict[str, Page | None]:
    """Read the metrics of all proxies at once."""
    read = await asyncio.gather(*(page(proxy, model) for proxy in proxies))
    return {proxy.id: each for proxy, each in zip(proxies, read, strict=True)}
