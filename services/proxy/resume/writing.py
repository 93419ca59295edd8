"""Bringing one stream to its journal in Redis: in flushes, under a lease, for as long as it takes.

One task a stream. A flush is one script call, about ten times a second at most; the exchange never
waits for it. A flush that fails is repeated as it was (the script knows what it has), while the
client gets its events without it. Whoever is refused, because another proxy goes on with the
stream, ends its exchange at once.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

import msgspec
import structlog

from services.proxy.exchange import Exchange
from services.proxy.refusals import stream_broken
from services.proxy.resume.journal import Journal, Keeping
from shared.errors import RegistryError
from shared.registry.streams import (
    Append,
    Appended,
    Asked,
    Claimed,
    Known,
    Page,
    StreamState,
    Writer,
)

FLUSH_S: Final = 0.1
"""Between two flushes, unless there is much to flush."""
RENEW_S: Final = 1.0
"""Between two flushes when there is nothing to flush."""
LEASE_S: Final = 4.0
SHOW_S: Final = 0.25
"""A client waits for the journal this long."""
DEADLINE_S: Final = 1.5
"""Of one call."""
AGAIN_S: Final = 0.5
"""After a call that failed."""
FROZEN_S: Final = 1.0
"""What is late by this much was frozen: another proxy may have gone on with its streams."""

_log = structlog.get_logger(__name__)


class Streams(Protocol):
    """What the journals' side of Redis offers (see `shared.registry.streams`)."""

    async def open(self, stream: str, writer: Writer, asked: Asked) -> bool:
        """Begin a journal."""
        ...

    async def append(
        self, stream: str, writer: Writer, append: Append, state: StreamState = StreamState.LIVE
    ) -> Appended:
        """Add to a journal and renew the lease."""
        ...

    async def known(self, stream: str) -> Known | None:
        """Read what a stream answers."""
        ...

    async def read(self, stream: str, after: int) -> Page | None:
        """Read the events after one."""
        ...

    async def claim(self, stream: str, writer: Writer) -> Claimed | None:
        """Take a stream over."""
        ...

    async def close(self, stream: str, state: StreamState, writer: Writer | None = None) -> bool:
        """End a stream for good; False if another writer goes on with it."""
        ...


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one stream may have."""

    size_bytes: int
    orphan_s: float


class Writing:
    """One stream that this proxy generates and journals."""

    def __init__(
        self,
        *,
        stream: str,
        streams: Streams,
        writer: Writer,
        journal: Journal,
        limits: Limits,
        cut_client: Callable[[], None],
        troubled: Callable[[], None],
    ) -> None:
        self.stream = stream
        self.journal = journal
        self.exchange: Exchange | None = None
        """What generates it; set before anything else happens."""
        self._streams = streams
        self._writer = writer
        self._limits = limits
        self._cut_client = cut_client
        self._troubled = troubled
        self._loop = asyncio.get_running_loop()
        self._append: Append | None = None
        """On its way; repeated as it is until there is an answer."""
        self._flushed_s = 0.0
        self._read_s = self._loop.time()
        """When somebody last read the stream, as far as is known."""
        self._over = False
        self._failing = False

    def cut(self) -> None:
        """End it where the exchange has no words for what happened."""
        journal = self.journal
        if journal.keeping is Keeping.KEPT and not journal.ended:
            journal.write(stream_broken("it was not a stream any more").event(), more=False)
            return
        journal.ended = True
        journal.woken.set()
        if journal.client is not None:
            self._cut_client()

    def detach(self) -> None:
        """Go on without the client; without a journal there is nobody to go on for."""
        journal = self.journal
        if journal.client is None:
            return
        journal.detach()
        self._read_s = self._loop.time()
        if journal.keeping is not Keeping.KEPT:
            self._stop()
        journal.woken.set()

    def cancel(self) -> None:
        """End it because its owner wants that."""
        self._over = True
        self._stop()
        if self.journal.client is not None:
            self._cut_client()
        self.journal.woken.set()

    async def run(self, asked: Asked) -> None:
        """Open the journal unless it is being gone on with; keep it to its end."""
        journal = self.journal
        if journal.keeping is Keeping.OPENING:
            journal.opened(kept=await self._open(asked))
        while journal.keeping is Keeping.KEPT and not self._over:
            await self._wait()
            await self._flush()
        if journal.keeping is Keeping.NONE:
            if journal.client is None:
                self._stop()
            await self._close()

    async def hand_over(self) -> None:
        """Stop here, so that another proxy can go on at once; the client must come again."""
        if self._over or self.journal.keeping is not Keeping.KEPT:
            return
        self._over = True
        self._stop()
        append = self._append or (None if self.journal.ended else self.journal.collect())
        given_up = msgspec.structs.replace(self._writer, lease_ms=0)
        await self._call(append or Append(), StreamState.LIVE, given_up)
        if self.journal.client is not None:
            self._cut_client()

    async def _open(self, asked: Asked) -> bool:
        try:
            async with asyncio.timeout(SHOW_S):
                return await self._streams.open(self.stream, self._writer, asked)
        except (RegistryError, TimeoutError) as error:
            self._troubled()
            _log.warning("journal_not_opened", stream=self.stream[:8], reason=str(error))
            return False

    async def _wait(self) -> None:
        """Wait until a flush makes sense."""
        journal = self.journal
        await _set_within(journal.woken, RENEW_S)
        pause_s = (AGAIN_S if self._failing else FLUSH_S) - (self._loop.time() - self._flushed_s)
        if pause_s > 0 and not self._over:
            await _set_within(asyncio.Event() if self._failing else journal.full, pause_s)

    async def _flush(self) -> None:
        journal = self.journal
        if self._over or journal.keeping is not Keeping.KEPT:
            return
        self._append = self._append or journal.collect()
        if journal.size_bytes > self._limits.size_bytes:
            await self._give_up("the journal became too long")
            return
        append = self._append or Append()
        state = StreamState.LIVE
        if journal.ended and journal.last == (append.last or journal.last):
            state = StreamState.DONE if journal.tape.finished else StreamState.BROKEN
        appended = await self._call(append, state, self._writer)
        self._flushed_s = self._loop.time()
        if appended is not None:
            await self._learn(appended, append.last or journal.collected, state)

    async def _call(self, append: Append, state: StreamState, writer: Writer) -> Appended | None:
        began_s = self._loop.time()
        patience = self._loop.call_later(SHOW_S, self._impatient, began_s)
        try:
            async with asyncio.timeout(DEADLINE_S):
                appended = await self._streams.append(self.stream, writer, append, state)
        except (RegistryError, TimeoutError) as error:
            self._troubled()
            if not self._failing:
                _log.warning("journal_not_written", stream=self.stream[:8], reason=str(error))
            self._failing = True
            if self._loop.time() - began_s < DEADLINE_S + FROZEN_S:
                self.journal.show_all()
            return None
        finally:
            patience.cancel()
        self._failing = False
        return appended

    def _impatient(self, began_s: float) -> None:
        if self._loop.time() - began_s < SHOW_S + FROZEN_S:
            self.journal.show_all()

    async def _learn(self, appended: Appended, last: int, state: StreamState) -> None:
        journal = self.journal
        if appended.status == "OK":
            self._append = None
            journal.confirmed(last)
            self._over = state is not StreamState.LIVE
            if not self._over:
                self._mind_readers(appended.idle_ms)
        elif appended.status in {"FENCED", "ENDED"}:
            self._refused(appended.status)
        else:
            await self._give_up(f"the journal is not what it was ({appended.status})")

    def _refused(self, reason: str) -> None:
        """End at once: somebody else goes on with the stream, or nobody may."""
        _log.warning("journal_refused", stream=self.stream[:8], reason=reason)
        self.cancel()

    def _mind_readers(self, idle_ms: int) -> None:
        """Stop when nobody has read for too long: who comes later finds another proxy."""
        now_s = self._loop.time()
        if self.journal.client is not None:
            self._read_s = now_s
        elif idle_ms >= 0:
            self._read_s = max(self._read_s, now_s - idle_ms / 1000)
        if now_s - self._read_s > self._limits.orphan_s:
            _log.info("stream_left_alone", stream=self.stream[:8])
            self._over = True
            self._stop()

    async def _give_up(self, reason: str) -> None:
        """Keep no journal from now on; unless it is another proxy's, which goes on with it."""
        if not await self._close():
            self._refused("FENCED")
            return
        _log.warning("journal_given_up", stream=self.stream[:8], reason=reason)
        self.journal.give_up()
        if self.journal.client is None:
            self._stop()

    def _stop(self) -> None:
        if self.exchange is not None and not self.exchange.done:
            self.exchange.client_gone()

    async def _close(self) -> bool:
        """End the journal in Redis; False if it is another proxy's by now."""
        patience = self._loop.call_later(SHOW_S, self._impatient, self._loop.time())
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await self._streams.close(self.stream, StreamState.LOST, self._writer)
        except (RegistryError, TimeoutError) as error:
            self._troubled()
            _log.warning("journal_not_closed", stream=self.stream[:8], reason=str(error))
            return True
        finally:
            patience.cancel()


async def _set_within(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
