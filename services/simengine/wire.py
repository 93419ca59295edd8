"""HTTP/1.1 as bytes in, bytes out: one protocol per connection, no task per request or token.

A request is handed to a plain function as an `Exchange`; the answer is written whenever it is
ready, by whoever has it (the engine's step loop writes every stream's next chunk in one go).
That is what makes a token cheap, and it is why this is not an ASGI application.
"""

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from time import time
from typing import Final, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, parse_url

JSON: Final = b"application/json"
EVENT_STREAM: Final = b"text/event-stream; charset=utf-8"
_MAX_PIPELINED: Final = 32
_STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_SWEEP_INTERVAL_S: Final = 0.5


class Exchange:
    """One request and the way to answer it.

    Exactly one of `reply` or (`begin_stream`, `write`…, `end`) answers. `on_gone` is called if
    the client closes first; after that, writes do nothing.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "body",
        "done",
        "headers",
        "method",
        "on_gone",
        "on_writable",
        "path",
        "query",
        "status",
        "streaming",
    )

    def __init__(
        self,
        connection: "Connection",
        method: bytes,
        path: str,
        query: bytes,
        headers: dict[bytes, bytes],
        body: bytes,
    ) -> None:
        self._connection = connection
        self._chunked = True
        self.method = method.decode("ascii", "replace")
        self.path = path
        self.query = query
        self.headers = headers
        self.body = body
        self.status = 0
        self.streaming = False
        self.done = False
        self.on_gone: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None

    @property
    def paused(self) -> bool:
        """True while the client reads more slowly than we write."""
        return self._connection.write_paused

    @property
    def loopback(self) -> bool:
        """True if the client is on this machine."""
        peer = self._connection.peer_host
        return peer.startswith("127.") or peer in {"::1", "::ffff:127.0.0.1"}

    def reply(
        self,
        status: int,
        body: bytes,
        *,
        content_type: bytes = JSON,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        """Answer whole; does nothing once the exchange is done."""
        if self.done:
            return
        self.status = status
        extra = b"".join([b"%b: %b\r\n" % header for header in headers])
        self._connection.transport_write(
            self._head(status)
            + b"content-length: %d\r\ncontent-type: %b\r\n%b\r\n%b"
            % (len(body), content_type, extra, body)
        )
        self._finish()

    def begin_stream(self, content_type: bytes = EVENT_STREAM) -> None:
        """Send the head of a streamed 200."""
        if self.done:
            return
        self.status = 200
        self.streaming = True
        self._chunked = not self._connection.http_1_0
        if self._connection.http_1_0:
            self._connection.keep_alive = False  # the end of the body is the end of the connection
        framing = b"transfer-encoding: chunked\r\n" if self._chunked else b""
        self._connection.transport_write(
            self._head(200) + framing + b"content-type: %b\r\n\r\n" % content_type
        )

    def write(self, data: bytes) -> None:
        """Send a piece of the streamed body (never empty)."""
        if self.done:
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._connection.transport_write(data)

    def end(self, data: bytes = b"") -> None:
        """Send the last piece and end the streamed body."""
        if self.done:
            return
        if data:
            self.write(data)
        if self._chunked:
            self._connection.transport_write(b"0\r\n\r\n")
        self._finish()

    def cut(self) -> None:
        """Close the connection without ending the body, as a dying engine does."""
        if not self.done:
            self.done = True
            self._connection.close()

    def gone(self) -> None:
        """Take note that the client has closed the connection."""
        if not self.done:
            self.done = True
            if self.on_gone is not None:
                self.on_gone()

    def _head(self, status: int) -> bytes:
        server = self._connection.server
        close = b"" if self._connection.keep_alive else b"connection: close\r\n"
        return _STATUS_LINES[status] + server.common_headers() + close

    def _finish(self) -> None:
        self.done = True
        self.on_gone = self.on_writable = None
        self._connection.exchange_finished()


class Connection(asyncio.Protocol):
    """One client connection: parses requests, keeps their order, sees the client go."""

    def __init__(self, server: "HttpServer") -> None:
        self.server = server
        self.keep_alive = True
        self.http_1_0 = False
        self.write_paused = False
        self.peer_host = ""
        self.idle_since_s: float | None = server.now_s()
        self._transport: asyncio.Transport | None = None
        self._parser = HttpRequestParser(self)
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._queue: deque[tuple[Exchange, bool, bool]] = deque()
        self._current: Exchange | None = None

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport, without Nagle's delay between tokens."""
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self.peer_host = str(peer[0]) if peer else ""
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Abort what the client no longer waits for, however it left."""
        del exc
        self._transport = None
        self.server.forget(self)
        current, self._current = self._current, None
        self._queue.clear()
        if current is not None:
            current.gone()

    def eof_received(self) -> None:
        """Treat a half-closed connection as closed, as uvicorn does."""

    def pause_writing(self) -> None:
        """Note that the client is slower than we are."""
        self.write_paused = True

    def resume_writing(self) -> None:
        """Let the current stream send what it held."""
        self.write_paused = False
        if self._current is not None and self._current.on_writable is not None:
            self._current.on_writable()

    def data_received(self, data: bytes) -> None:
        """Feed the parser; what is not HTTP gets a 400 and a closed connection."""
        self.idle_since_s = None
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            pass  # the request was taken as an ordinary one; that is our answer to the offer
        except HttpParserError:
            body = b"Invalid HTTP request received."
            self.transport_write(
                _STATUS_LINES[400]
                + b"content-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
                + b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
            self.close()

    # --- httptools callbacks

    def on_message_begin(self) -> None:
        """Start a request."""
        self._url = b""
        self._headers = {}
        self._body = []

    def on_url(self, url: bytes) -> None:
        """Collect the target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header, with its name in lower case."""
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """Let a client that asks first send its body."""
        if self._headers.get(b"expect", b"").lower() == b"100-continue":
            self.transport_write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """Collect the body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Queue the request behind those before it on this connection."""
        url = parse_url(self._url)
        exchange = Exchange(
            self,
            self._parser.get_method(),
            (url.path or b"/").decode("latin-1"),
            url.query or b"",
            self._headers,
            b"".join(self._body),
        )
        http_1_0 = self._parser.get_http_version() == "1.0"
        self._queue.append((exchange, self._parser.should_keep_alive(), http_1_0))
        if len(self._queue) > _MAX_PIPELINED and self._transport is not None:
            self._transport.pause_reading()
        if self._current is None:
            self._next()

    # --- used by Exchange and HttpServer

    def transport_write(self, data: bytes) -> None:
        """Write, unless the client has gone."""
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        """Close after what is written has been sent."""
        if self._transport is not None:
            self._transport.close()

    def exchange_finished(self) -> None:
        """Go on with the next request, or wait for one."""
        self._current = None
        if not self.keep_alive or self.server.closing:
            self.close()
            return
        self.idle_since_s = self.server.now_s()
        if self._queue:
            # From the loop, not from here: a client that pipelines must not deepen the stack.
            self.server.loop.call_soon(self._next)

    def _next(self) -> None:
        if self._current is not None or not self._queue or self._transport is None:
            return
        exchange, self.keep_alive, self.http_1_0 = self._queue.popleft()
        if len(self._queue) == _MAX_PIPELINED:
            self._transport.resume_reading()
        self.idle_since_s = None
        self._current = exchange
        self.server.handler(exchange)


class HttpServer:
    """Listens, and closes connections that were idle too long (uvicorn's 5 s by default)."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        handler: Callable[[Exchange], None],
        *,
        keep_alive_s: float = 5.0,
    ) -> None:
        self.loop = loop
        self.handler = handler
        self.connections: set[Connection] = set()
        self.closing = False
        self._emptied = asyncio.Event()
        self.port = 0
        self._keep_alive_s = keep_alive_s
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._common = b""
        self._common_until_s = 0.0

    def now_s(self) -> float:
        """Return the loop's clock, in seconds."""
        return self.loop.time()

    async def start(self, sock: socket.socket) -> None:
        """Listen on a bound socket."""
        self.port = int(sock.getsockname()[1])
        self._server = await self.loop.create_server(
            lambda: Connection(self), sock=sock, backlog=2048
        )
        self._sweep = self.loop.call_later(_SWEEP_INTERVAL_S, self._close_idle)

    async def stop(self, *, timeout_s: float) -> None:
        """Stop listening, let written bytes leave, and close; at most `timeout_s` seconds."""
        self.closing = True
        if self._sweep is not None:
            self._sweep.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.close()
        if self.connections:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._emptied.wait()

    def forget(self, connection: Connection) -> None:
        """Take note that a connection has closed."""
        self.connections.discard(connection)
        if self.closing and not self.connections:
            self._emptied.set()

    def common_headers(self) -> bytes:
        """Return the headers every answer has; the date is made once a second."""
        now_s = self.now_s()
        if now_s >= self._common_until_s:
            date = formatdate(time(), usegmt=True)
            self._common = f"date: {date}\r\nserver: uvicorn\r\n".encode()
            self._common_until_s = now_s + 1.0
        return self._common

    def _close_idle(self) -> None:
        limit_s = self.now_s() - self._keep_alive_s
        for connection in list(self.connections):
            idle_s = connection.idle_since_s
            if idle_s is not None and idle_s < limit_s:
                connection.close()
        self._sweep = self.loop.call_later(_SWEEP_INTERVAL_S, self._close_idle)
