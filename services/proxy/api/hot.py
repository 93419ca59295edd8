"""The hot routes: plain ASGI, so that a request costs no more than it must.

A handler reads the body, peeks into it, finds the model and begins an exchange; then it merely
waits until ASGI says that the client has gone or the answer is complete. All else is driven by
what arrives from Redis and from the replica.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import unquote

import structlog
from litestar.types import HTTPScope, Receive, Scope, Send

from services.proxy import refusals
from services.proxy.client import Client, Outlet
from services.proxy.continuation.tape import Tape
from services.proxy.exchange import Exchange
from services.proxy.inbound import (
    Inbound,
    RefusedError,
    inbound,
    named_model,
    peek,
    request_id_of,
    text_request,
    with_model,
)
from services.proxy.lane import DirectCycle, Head
from services.proxy.paths import ADDRESSED, CHAT, Route
from services.proxy.presence import Presence
from services.proxy.refusals import Dialect, Refusal
from services.proxy.relay import Relay
from services.proxy.resume.api import StreamRoutes, wants_resuming
from services.proxy.serving import Fleet
from services.proxy.stepping import begin
from services.proxy.table import ModelTable
from services.proxy.textrelay import TextRelay
from shared.models.deployment import StreamFailover

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]

JSON: Final = "application/json"
TEXT: Final = "text/plain"
DISCARD_S: Final = 2.0

_log = structlog.get_logger(__name__)


class _GoneError(Exception):
    """The client left before its request was read."""


class _TooLargeError(Exception):
    """The body is over the limit, and perhaps not at its end."""


class HotRoutes:
    """Makes the ASGI handlers of the routes that go to replicas."""

    def __init__(self, fleet: Fleet, streams: StreamRoutes) -> None:
        self._fleet = fleet
        self._streams = streams
        self._settings = fleet.settings

    def handler(self, route: Route) -> Handler:
        """Make the handler of one ordinary route."""

        async def handle(scope: Scope, receive: Receive, send: Send) -> None:
            await self._guarded(scope, receive, send, route, self._ordinary)

        return handle

    def addressed_handler(self) -> Handler:
        """Make the handler of `/v1/chat/{model}`."""

        async def handle(scope: Scope, receive: Receive, send: Send) -> None:
            await self._guarded(scope, receive, send, CHAT, self._addressed)

        return handle

    async def _guarded(
        self,
        scope: Any,  # noqa: ANN401 - HTTP by the router's choice; ASGI types it as a union
        receive: Receive,
        send: Send,
        route: Route,
        act: Callable[[HTTPScope, Head, Receive, Send, Route], Awaitable[None]],
    ) -> None:
        head = Head(scope["headers"])
        head.request_id = request_id_of(head.request_id)
        if scope["method"] != "POST":
            refusal = refusals.wrong_method(scope["method"], "POST")
            await self._refuse(send, refusal, head.request_id, route.dialect)
            return
        try:
            await act(scope, head, receive, send, route)
        except RefusedError as error:
            await self._refuse(send, error.refusal, head.request_id, route.dialect)
        except _GoneError:
            return

    async def _ordinary(
        self, scope: HTTPScope, head: Head, receive: Receive, send: Send, route: Route
    ) -> None:
        _check_json(head)
        body = await self._body(head, receive)
        given = peek(body)
        table = self._resolve(named_model(given))
        request = inbound(route.upstream, body, head.request_id, given)
        if head.resumable and wants_resuming(head.resumable):
            given_headers = scope["headers"]
            await self._streams.serve(given_headers, table, request, receive, send, text=False)
        else:
            await self._serve(table, request, receive, send, route, Relay)

    async def _addressed(
        self, scope: HTTPScope, head: Head, receive: Receive, send: Send, route: Route
    ) -> None:
        path = scope["raw_path"].decode("latin-1") if "raw_path" in scope else scope["path"]
        name = unquote(path.partition(ADDRESSED)[2]).strip("/")
        if not path.startswith(ADDRESSED) or not name:
            raise RefusedError(refusals.unknown_route(path))
        table = self._resolve(name)
        media_type = head.media_type
        if media_type == TEXT:
            body = text_request(table.model, await self._body(head, receive), scope["query_string"])
            shape: type[Relay] = TextRelay
        elif media_type.startswith("application/") and media_type.endswith("json"):
            body = with_model(await self._body(head, receive), table.model)
            shape = Relay
        else:
            wanted = f"{JSON} (a chat request) or {TEXT} (a prompt)"
            raise RefusedError(refusals.wrong_content_type(media_type, wanted))
        request = inbound(route.upstream, body, head.request_id, peek(body))
        if head.resumable and wants_resuming(head.resumable):
            given_headers, text = scope["headers"], shape is TextRelay
            await self._streams.serve(given_headers, table, request, receive, send, text=text)
        else:
            await self._serve(table, request, receive, send, route, shape)

    def _resolve(self, name: str) -> ModelTable:
        tables = self._fleet.tables
        table = tables.resolve(name)
        if table is None:
            if not tables.catalogued:
                raise RefusedError(refusals.starting())
            known = [known.model for known in tables.models()]
            raise RefusedError(refusals.unknown_model(name, known))
        return table

    async def _serve(
        self,
        table: ModelTable,
        request: Inbound,
        receive: Receive,
        send: Send,
        route: Route,
        shape: type[Relay],
    ) -> None:
        client = Client(send, self._fleet.pumps)
        waiting = Presence(receive)
        exchange = self._exchange(table, request, route, shape, client, waiting.cut)
        client.on_flow(exchange.client_flows)
        exchange.begin()
        try:
            await waiting.for_the_end()
        except asyncio.CancelledError:
            exchange.shut()
            raise
        except BaseException:
            exchange.client_gone()
            raise
        exchange.client_gone()

    def _exchange(
        self,
        table: ModelTable,
        request: Inbound,
        route: Route,
        shape: type[Relay],
        client: Outlet,
        cut: Callable[[], None],
    ) -> Exchange:
        served = self._fleet.of(table)
        request.output_tokens = served.output.expect(request.client_limit_tokens, request.choices)
        relay = shape(
            client,
            request_id=request.request_id,
            dialect=route.dialect,
            model=table.model,
            path=route.path,
        )
        if request.tape is not None and table.spec.stream_failover is not StreamFailover.OFF:
            relay.tape = Tape(request.tape)
        if isinstance(client, DirectCycle):
            relay.lane = client
        return Exchange(self._fleet, served, request, relay, cut)

    # the lane

    def enter(self, cycle: DirectCycle, body: bytes) -> Exchange | None:
        """Begin to answer a request of the lane; None if that is done already."""
        head, route = cycle.head, cycle.route
        cycle.request_id = request_id_of(head.request_id)
        try:
            if not head.is_json:
                _check_json(head)
            given = peek(body)
            table = self._resolve(named_model(given))
            taped = table.spec.stream_failover is not StreamFailover.OFF
            request = inbound(route.upstream, body, cycle.request_id, given, taped=taped)
            exchange = self._exchange(table, request, route, Relay, cycle, cycle.cut)
            exchange.begin()
        except RefusedError as error:
            self.refuse(cycle, error.refusal)
        except Exception:  # noqa: BLE001 - as the application does: a fault of ours is a 500
            _log.exception("request_failed", path=route.path)
            self.refuse(cycle, refusals.internal())
        else:
            return exchange
        return None

    def refuse(self, cycle: DirectCycle, refusal: Refusal) -> None:
        """Answer a request of the lane with an error of our own."""
        if cycle.started:
            cycle.cut()
            return
        self._fleet.metrics.refused.labels(str(refusal.status)).inc()
        body, headers = _refusal_of(refusal, cycle.request_id, cycle.route.dialect)
        cycle.start(refusal.status, headers)
        cycle.write(body, more=False)

    async def _body(self, head: Head, receive: Receive) -> bytes:
        limit = self._settings.max_body_bytes
        if head.length > limit:
            await self._discard(receive)
            raise RefusedError(refusals.body_too_large(limit))
        # Nearly always the body came with the head, and this does not wait.
        message, rest = begin(_received(receive))
        if rest is None and message is not None and not message.get("more_body"):
            body = _body_of(message)
            if len(body) > limit:
                raise RefusedError(refusals.body_too_large(limit))
            return body
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                return await self._slow_body(message, rest, receive, limit)
        except _TooLargeError:
            await self._discard(receive)
            raise RefusedError(refusals.body_too_large(limit)) from None
        except TimeoutError:
            raise RefusedError(refusals.body_too_slow(self._settings.body_timeout_s)) from None

    async def _slow_body(
        self,
        message: Any,  # noqa: ANN401 - an ASGI message
        rest: Any,  # noqa: ANN401 - what is left of receiving it
        receive: Receive,
        limit: int,
    ) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            if message is None:
                message = await rest if rest is not None else await receive()
                rest = None
            part = _body_of(message)
            size += len(part)
            if size > limit:
                raise _TooLargeError
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)
            message = None

    async def _discard(self, receive: Receive) -> None:
        """Read on for a moment: a client that is cut off while it sends never sees the answer."""
        left_bytes = self._settings.max_body_bytes
        try:
            async with asyncio.timeout(DISCARD_S):
                while left_bytes > 0:
                    message: Any = await receive()
                    left_bytes -= len(_body_of(message))
                    if not message.get("more_body"):
                        return
        except TimeoutError:
            return

    async def _refuse(
        self, send: Send, refusal: Refusal, request_id: bytes, dialect: Dialect
    ) -> None:
        self._fleet.metrics.refused.labels(str(refusal.status)).inc()
        body, headers = _refusal_of(refusal, request_id, dialect)
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


def _check_json(head: Head) -> None:
    if not head.is_json:
        raise RefusedError(refusals.wrong_content_type(head.media_type, JSON))


def _refusal_of(
    refusal: Refusal, request_id: bytes, dialect: Dialect
) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Give the body and the headers of an error answer."""
    body = refusal.body(dialect)
    headers = refusal.headers(request_id, body)
    if refusal.status in {408, 413}:
        # What is left of the body will not be read: the connection cannot go on.
        headers.append((b"connection", b"close"))
    return body, headers


async def _received(receive: Receive) -> Any:  # noqa: ANN401 - an ASGI message
    return await receive()


def _body_of(message: Any) -> bytes:  # noqa: ANN401 - an ASGI message
    if message["type"] == "http.disconnect":
        raise _GoneError
    body: bytes = message.get("body", b"")
    return body
