"""Sending a stream's journal to whoever resumes it, and what comes after, to its end.

A reader polls the journal, wherever the writer is. When the writer is gone its own proxy becomes
the writer, and the reader goes on as before: one path for all cases.
"""

import asyncio
from typing import Final

from services.proxy.client import Client
from services.proxy.inbound import RefusedError
from services.proxy.refusals import Refusal, stream_broken
from services.proxy.resume.events import after
from services.proxy.resume.refusals import cancelled, journal_away, unknown_event, unknown_stream
from services.proxy.resume.room import StreamRoom
from shared.errors import RegistryError
from shared.registry.streams import Asked, Page, StreamState

POLL_S: Final = 0.05
AGAIN_S: Final = 0.5
"""After Redis did not answer."""
AWAY_S: Final = 60.0
"""A reader that has begun waits this long for Redis."""
AHEAD_S: Final = 2.0
"""A client may have seen more than the journal has while Redis was away; its writer catches up."""
ENDED: Final = frozenset({StreamState.DONE, StreamState.BROKEN})
GONE: Final = frozenset({StreamState.CANCELLED, StreamState.LOST})


class Reader:
    """One client that reads a stream from its journal, from event `seen` on."""

    def __init__(self, room: StreamRoom, stream: str, asked: Asked, seen: int) -> None:
        self._room = room
        self._stream = stream
        self._asked = asked
        self._seen = seen
        self._loop = asyncio.get_running_loop()
        self._heard_s = self._moved_s = self._loop.time()

    async def first(self) -> Page:
        """Read the first page; raises RefusedError where there is nothing to go on with."""
        until_s = self._loop.time() + AHEAD_S
        while True:
            try:
                page = await self._room.streams.read(self._stream, self._seen)
            except RegistryError as error:
                self._room.troubled()
                raise RefusedError(journal_away()) from error
            if page is None or page.state in GONE:
                raise RefusedError(unknown_stream())
            if page.last >= self._seen:
                return page
            if page.state in ENDED or self._loop.time() > until_s:
                raise RefusedError(unknown_event(page.last))
            await asyncio.sleep(POLL_S)

    def finished(self, page: Page) -> bool:
        """Tell whether there is nothing more to come after `page`'s beginning."""
        return page.state in ENDED and self._seen >= page.last

    async def run(self, page: Page | None, client: Client) -> None:
        """Send `page` and what follows, to the end of the stream."""
        flows = asyncio.Event()
        client.on_flow(flows.set)
        while page is not None and page.state not in GONE:
            if not self._send(page, client):
                _break(client, stream_broken("a part of its journal is missing"))
                return
            if self.finished(page):
                client.write(b"", more=False)
                return
            while client.stalled:
                flows.clear()
                await flows.wait()
            if not page.appends:
                if self._stuck(page):
                    _break(client, stream_broken("no proxy could go on with it"))
                    return
                await self._await_more(page)
            try:
                page = await self._room.streams.read(self._stream, self._seen)
                self._heard_s = self._loop.time()
            except RegistryError:
                self._room.troubled()
                if self._loop.time() - self._heard_s > AWAY_S:
                    _break(client, stream_broken("its journal cannot be read"))
                    return
                await asyncio.sleep(AGAIN_S)
        if page is not None and page.state is StreamState.CANCELLED:
            _break(client, cancelled())
        else:
            _break(client, stream_broken("its journal is gone"))

    def _send(self, page: Page, client: Client) -> bool:
        """Send what is new on `page`; False if something before it is missing."""
        for first, events in page.appends:
            if first > self._seen + 1:
                return False
            fresh, self._seen = after(events, first, self._seen)
            if fresh:
                self._moved_s = self._loop.time()
                client.write(fresh, more=True)
        return True

    def _stuck(self, page: Page) -> bool:
        waits_s = self._loop.time() - self._moved_s
        return page.lease_left_ms <= 0 and waits_s > self._room.fleet.settings.hold_timeout_s

    async def _await_more(self, page: Page) -> None:
        """Wait a moment; go on with the stream where its writer is gone."""
        if page.lease_left_ms <= 0 and page.state is StreamState.LIVE:
            try:
                await self._room.take_over(self._stream, self._asked, page)
            except RegistryError:
                self._room.troubled()
        await asyncio.sleep(POLL_S)


def _break(client: Client, refusal: Refusal) -> None:
    client.write(refusal.event(), more=False)
