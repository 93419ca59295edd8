"""A worker's end of what ties it to its parent: a socket pair on which each says one thing.

The worker says once who it is. The parent says that it is alive, by not having closed its end: the
kernel closes that even for a parent that was killed. A worker whose parent is gone drains: its
streams can still end well, and whoever starts the next parent finds the port free of listeners
within a second. Ending at once would lose what it carries, and going on would serve beside the
next parent's workers for ever.
"""

import asyncio
import socket
from typing import Self

import msgspec

from shared.admin import fetch

METRICS_DEADLINE_S = 3.0


class Announcement(msgspec.Struct, frozen=True):
    """Who a worker is; one line of JSON."""

    proxy: str
    admin_url: str


class Tie:
    """A worker's end. Use as an async context manager."""

    def __init__(self, fd: int, slot: int, metrics_url: str) -> None:
        self.slot = slot
        """Which of the workers this one is, from 0."""
        self._fd = fd
        self._metrics_url = metrics_url
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        given = socket.socket(fileno=self._fd)
        given.setblocking(False)
        given.set_inheritable(False)
        self._reader, self._writer = await asyncio.open_unix_connection(sock=given)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def announce(self, announcement: Announcement) -> None:
        """Say who this worker is, once its admin port answers and it begins to listen."""
        if self._writer is not None:
            self._writer.write(msgspec.json.encode(announcement) + b"\n")

    async def parent_ended(self) -> None:
        """Return when the parent has ended."""
        try:
            while self._reader is not None and await self._reader.read(1):
                pass
        except OSError:
            pass  # an end, too

    async def metrics(self) -> bytes:
        """Ask the parent for the metrics of all workers; raises OSError or ValueError."""
        return await fetch(self._metrics_url, deadline_s=METRICS_DEADLINE_S)
