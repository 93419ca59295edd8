"""What clients call: a request for a resumable stream, and `/v1/streams/{id}`."""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

from litestar.types import Receive, Scope, Send

from services.proxy import refusals
from services.proxy.client import Client
from services.proxy.continuation.plan import PATHS
from services.proxy.inbound import Inbound, RefusedError, peek, request_id_of
from services.proxy.presence import Presence
from services.proxy.refusals import Refusal
from services.proxy.resume.events import event_number
from services.proxy.resume.reading import Reader
from services.proxy.resume.refusals import (
    bad_event_id,
    cannot_resume,
    journal_away,
    too_many,
    unknown_stream,
)
from services.proxy.resume.room import StreamRoom, owned
from services.proxy.table import ModelTable
from shared.errors import RegistryError
from shared.models.deployment import StreamFailover
from shared.registry.keys import STREAM_ID
from shared.registry.streams import Known, StreamState

PATH: Final = "/v1/streams/"
OFF: Final = frozenset({b"", b"0", b"false"})
ON: Final = frozenset({b"1", b"true"})

Headers = Iterable[tuple[bytes, bytes]]


class StreamRoutes:
    """Resumable streams as their clients see them."""

    def __init__(self, room: StreamRoom) -> None:
        self._room = room
        self._metrics = room.fleet.metrics
        self._limit = room.fleet.settings.max_resumable_streams

    async def serve(
        self,
        headers: Headers,
        table: ModelTable,
        request: Inbound,
        receive: Receive,
        send: Send,
        *,
        text: bool,
    ) -> None:
        """Answer a request whose stream can be resumed; raises RefusedError where it cannot."""
        if reason := self._unfit(table, request, text=text):
            raise RefusedError(cannot_resume(reason))
        client = Client(send, self._room.fleet.pumps)
        presence = Presence(receive)
        owner = _header(headers, b"authorization")
        writing = self._room.begin(table, request, owner, client, presence.cut)
        try:
            await presence.for_the_end()
        finally:
            writing.detach()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve `/v1/streams/{id}`: GET resumes, DELETE cancels."""
        asked: Any = scope
        headers, method = asked["headers"], asked["method"]
        request_id = request_id_of(_header(headers, b"x-request-id"))
        stream = asked["path"].removeprefix(PATH).strip("/")
        try:
            if method == "GET":
                await self._resume(stream, headers, request_id, receive, send)
            elif method == "DELETE":
                await self._cancel(stream, headers, request_id, send)
            else:
                raise RefusedError(refusals.wrong_method(method, "GET, DELETE"))  # noqa: TRY301 - one way to refuse
        except RefusedError as error:
            await self._refuse(send, error.refusal, request_id)

    def _unfit(self, table: ModelTable, request: Inbound, *, text: bool) -> str:
        """Say why this request's stream cannot be journaled; empty if it can."""
        if text or request.path not in PATHS:
            return "only chat and completions with JSON bodies can be"
        if peek(request.body).stream is not True:
            return "only streams can be: set `stream` to true"
        if request.tape is None:
            return "streams with several choices, `echo` or tools cannot go on elsewhere"
        if table.spec.stream_failover is StreamFailover.OFF:
            return "stream failover is off for this model"
        if len(request.body) > self._room.fleet.settings.resumable_bytes // 2:
            return "its body is too large to be kept beside its stream"
        return ""

    async def _resume(
        self, stream: str, headers: Headers, request_id: bytes, receive: Receive, send: Send
    ) -> None:
        given = _header(headers, b"last-event-id")
        seen = event_number(given) if given else 0
        if seen is None:
            raise RefusedError(bad_event_id())
        known = await self._known(stream, headers)
        if self._room.readers >= self._limit:
            raise RefusedError(too_many(self._limit))
        reader = Reader(self._room, stream, known.asked, seen)
        page = await reader.first()
        self._metrics.resumes.labels("followed").inc()
        if reader.finished(page):
            # 204 tells an EventSource, which comes back by itself, that there is no more.
            await _answer(send, 204, [(b"x-request-id", request_id)], b"")
            return
        client = Client(send, self._room.fleet.pumps)
        client.start(
            200,
            [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"x-request-id", request_id),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
                (b"x-redmesh-stream", stream.encode()),
            ],
        )
        presence = Presence(receive)
        reading = asyncio.get_running_loop().create_task(reader.run(page, client))
        # A reader that fails is no reader: its client learns it by the end of the connection.
        reading.add_done_callback(lambda done: client.ended or done.cancelled() or presence.cut())
        self._room.readers += 1
        try:
            await presence.for_the_end()
        finally:
            self._room.readers -= 1
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _cancel(self, stream: str, headers: Headers, request_id: bytes, send: Send) -> None:
        await self._known(stream, headers)
        try:
            await self._room.streams.close(stream, StreamState.CANCELLED)
        except RegistryError as error:
            raise RefusedError(journal_away()) from error
        self._room.cancel(stream)
        await _answer(send, 204, [(b"x-request-id", request_id)], b"")

    async def _known(self, stream: str, headers: Headers) -> Known:
        """Find a stream of this caller; raises RefusedError."""
        if not STREAM_ID.fullmatch(stream):
            raise RefusedError(unknown_stream())
        try:
            known = await self._room.streams.known(stream)
        except RegistryError as error:
            self._room.troubled()
            raise RefusedError(journal_away()) from error
        if known is None or not owned(
            stream, _header(headers, b"authorization"), known.asked.owner
        ):
            raise RefusedError(unknown_stream())
        return known

    async def _refuse(self, send: Send, refusal: Refusal, request_id: bytes) -> None:
        self._metrics.refused.labels(str(refusal.status)).inc()
        body = refusal.body()
        await _answer(send, refusal.status, refusal.headers(request_id, body), body)


def wants_resuming(given: bytes) -> bool:
    """Read `X-Redmesh-Resumable`; raises RefusedError for a value that means nothing."""
    value = given.strip().lower()
    if value in ON:
        return True
    if value in OFF:
        return False
    raise RefusedError(cannot_resume("X-Redmesh-Resumable must be 1 or 0"))


def _header(headers: Headers, wanted: bytes) -> bytes:
    return next((value for name, value in headers if name == wanted), b"")


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
