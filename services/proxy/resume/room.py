"""The resumable streams of this proxy: those it writes, and those it takes over from a dead one.

Every task here is owned by the room and ends with it. A stream is taken over for a reader who
finds its writer's lease over, and only by the proxy of that reader.
"""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import Final

import msgspec
import structlog

from services.proxy.client import Client
from services.proxy.continuation.memo import Memo
from services.proxy.continuation.tape import Options, Tape
from services.proxy.exchange import Exchange
from services.proxy.inbound import Inbound, RefusedError, inbound, peek
from services.proxy.refusals import Dialect
from services.proxy.relay import Relay
from services.proxy.resume.journal import Journal
from services.proxy.resume.refusals import too_many
from services.proxy.resume.writing import LEASE_S, Limits, Streams, Writing
from services.proxy.serving import Fleet
from services.proxy.table import ModelTable
from shared.ids import new_suffix
from shared.registry.streams import Asked, Claimed, Page, StreamState, Writer

HAND_OVER_S: Final = 2.0

_log = structlog.get_logger(__name__)
_MEMO: Final = msgspec.json.Decoder(Memo)


class StreamRoom:
    """The resumable streams that this proxy writes."""

    def __init__(self, fleet: Fleet, streams: Streams) -> None:
        self.streams = streams
        self.fleet = fleet
        self.readers = 0
        """Those who resume on this proxy now."""
        self._settings = fleet.settings
        # A repeated claim is known by its writer: no two rooms may have one name.
        self._name = f"{fleet.proxy[:100]}/{new_suffix()}"
        self._limits = Limits(
            size_bytes=fleet.settings.resumable_bytes, orphan_s=fleet.settings.resumable_orphan_s
        )
        self._writings: dict[str, Writing] = {}
        self._claiming: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._trouble_s = float("-inf")
        self._closed = False

    def __len__(self) -> int:
        return len(self._writings)

    def begin(
        self,
        table: ModelTable,
        request: Inbound,
        owner: bytes,
        client: Client,
        cut_client: Callable[[], None],
    ) -> Writing:
        """Begin a stream for a client; raises RefusedError if there are too many."""
        if len(self._writings) >= self._settings.max_resumable_streams:
            raise RefusedError(too_many(self._settings.max_resumable_streams))
        stream = secrets.token_hex(16)
        asked = Asked(
            model=table.model,
            path=request.path.decode(),
            body=request.body,
            request_id=request.request_id.decode(),
            owner=digest(stream, owner),
        )
        journal = Journal(stream, client, Tape(request.tape or Options()))
        journal.size_bytes = len(request.body)
        return self._write(asked, table, request, journal, self._writer(1), cut_client, stream)

    async def take_over(self, stream: str, asked: Asked, page: Page) -> None:
        """Go on with a stream whose writer's lease is over, unless somebody else does."""
        table = self.fleet.tables.get(asked.model)
        full = len(self._writings) >= self._settings.max_resumable_streams
        if table is None or full or self._closed or stream in self._writings:
            return
        if stream in self._claiming or self.fleet.now_s() - self._trouble_s < LEASE_S:
            return  # when Redis was away, the writer gets the time to show that it lives
        self._claiming.add(stream)
        try:
            claimed = await self.streams.claim(stream, self._writer(page.epoch))
            if claimed is not None:
                await self._go_on(stream, asked, claimed, table)
        finally:
            self._claiming.discard(stream)

    def cancel(self, stream: str) -> None:
        """End a stream here, if it is written here."""
        writing = self._writings.get(stream)
        if writing is not None:
            writing.cancel()

    def troubled(self) -> None:
        """Note that Redis could not be asked."""
        self._trouble_s = self.fleet.now_s()

    async def aclose(self) -> None:
        """Hand every stream over to whoever resumes it elsewhere; end every task."""
        self._closed = True
        handing = [writing.hand_over() for writing in self._writings.values()]
        try:
            async with asyncio.timeout(HAND_OVER_S):
                await asyncio.gather(*handing)
        except TimeoutError:
            _log.warning("streams_not_handed_over", streams=len(handing))
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _go_on(self, stream: str, asked: Asked, claimed: Claimed, table: ModelTable) -> None:
        writer = self._writer(claimed.epoch)
        try:
            memos = [_MEMO.decode(tape) for tape in claimed.tapes]
            request = inbound(
                asked.path.encode(), asked.body, asked.request_id.encode(), peek(asked.body)
            )
        except (msgspec.DecodeError, UnicodeDecodeError, RefusedError) as error:
            _log.warning("journal_not_read", stream=stream[:8], reason=str(error))
            await self.streams.close(stream, StreamState.LOST, writer)
            return
        if not claimed.whole:
            _log.warning("journal_not_whole", stream=stream[:8])
            await self.streams.close(stream, StreamState.LOST, writer)
            return
        _log.info("stream_taken_over", stream=stream[:8], last=claimed.last)
        journal = Journal(stream, None, Tape.recall(request.tape or Options(), memos))
        journal.recall(claimed.last, claimed.size_bytes)
        self.fleet.metrics.resumes.labels("taken_over").inc()
        self._write(asked, table, request, journal, writer, _nobody, stream)

    def _write(
        self,
        asked: Asked,
        table: ModelTable,
        request: Inbound,
        journal: Journal,
        writer: Writer,
        cut_client: Callable[[], None],
        stream: str,
    ) -> Writing:
        fleet = self.fleet
        served = fleet.of(table)
        request.output_tokens = served.output.expect(request.client_limit_tokens, request.choices)
        relay = Relay(
            journal,
            request_id=request.request_id,
            dialect=Dialect.OPENAI,
            model=table.model,
            path=asked.path,
        )
        relay.tape = journal.tape
        if journal.started:
            relay.go_on()
        writing = Writing(
            stream=stream,
            streams=self.streams,
            writer=writer,
            journal=journal,
            limits=self._limits,
            cut_client=cut_client,
            troubled=self.troubled,
        )
        writing.exchange = Exchange(fleet, served, request, relay, writing.cut)
        if journal.client is not None:
            journal.client.on_flow(writing.exchange.client_flows)
        self._writings[stream] = writing
        task = asyncio.get_running_loop().create_task(self._keep(writing, asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        writing.exchange.begin()
        return writing

    async def _keep(self, writing: Writing, asked: Asked) -> None:
        try:
            await writing.run(asked)
        except Exception as error:  # noqa: BLE001 - a fault with one stream must not end the others
            _log.error("stream_failed", stream=writing.stream[:8], exc_info=error)
            writing.cancel()
        finally:
            self._writings.pop(writing.stream, None)

    def _writer(self, epoch: int) -> Writer:
        return Writer(
            proxy=self._name,
            epoch=epoch,
            lease_ms=round(LEASE_S * 1000),
            life_ms=round(self._settings.resumable_life_s * 1000),
        )


def digest(stream: str, credential: bytes) -> str:
    """Tell callers apart without keeping what they know."""
    return hashlib.sha256(stream.encode() + b":" + credential).hexdigest()


def owned(stream: str, credential: bytes, owner: str) -> bool:
    """Tell whether a stream is this caller's."""
    return hmac.compare_digest(digest(stream, credential), owner)


def _nobody() -> None:
    """There is no client to cut off."""
