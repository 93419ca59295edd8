"""Tables for people: as wide as the terminal, and never cut when written to a file or a pipe."""

from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.models.replica import ReplicaState

_STYLES = {
    ReplicaState.READY: "green",
    ReplicaState.STARTING: "yellow",
    ReplicaState.PENDING: "yellow",
    ReplicaState.DRAINING: "yellow",
    ReplicaState.UNHEALTHY: "red",
    ReplicaState.FAILED: "red",
    "error": "red",
    "warning": "yellow",
    "fail": "red",
    "warn": "yellow",
    "ok": "green",
}

_PIPE_COLUMNS = 1000


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """What `get` shows: a table for people, and records for programs."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    records: list[object]
    empty: str
    """What to say when there is nothing."""
    wraps: str = ""
    """Column that may take several lines; the others are cut where a terminal is too narrow."""


def console() -> Console:
    """Make a console on stdout that cuts nothing unless it is a terminal."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=_PIPE_COLUMNS)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, wraps: str = "") -> Table:
    """Lay out rows under columns, without lines and with two blanks between columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        if column == wraps:
            made.add_column(column, overflow="fold", ratio=1)
        else:
            made.add_column(column, no_wrap=True, overflow="ellipsis")
    for row in rows:
        made.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return made


def render(listing: Listing) -> Table | Text:
    """Draw a listing."""
    if not listing.rows:
        return Text(listing.empty)
    return table(listing.columns, listing.rows, wraps=listing.wraps)


def age(ms: int) -> str:
    """Write a duration briefly: `12s`, `5m`, `3h`, `2d`."""
    seconds = max(0, ms) // 1000
    for unit, length_s in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds // length_s}{unit}"
    return f"{seconds}s"


def gib(count_bytes: int) -> str:
    """Write a number of bytes in GiB."""
    return f"{count_bytes / (1 << 30):.1f} GiB"
