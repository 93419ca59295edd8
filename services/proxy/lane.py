"""The fast lane: usual requests are answered in the callbacks of their connection, beneath ASGI.

A POST to a route of replicas, over HTTP/1.1, whose head says how long its body is, needs nothing
that a web framework gives: no task, no message queue, no dictionary for each piece of an answer.
Everything else (other methods and routes, bodies without a length or beyond the limit, pipelined
requests, resumable streams) goes through the application as always; both ways share all code from
the reading of the request on, and answer alike.

A `DirectCycle` stands where uvicorn's protocol keeps its own cycle, and is at the same time what
an exchange writes to (`client.Outlet`).
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Final, Protocol

from services.proxy.client import Headers
from services.proxy.framing import LAST_CHUNK
from services.proxy.paths import ROUTES, Route
from services.proxy.refusals import Refusal, body_too_slow

BODILESS: Final = 204

_BY_URL: Final = {route.path.encode(): route for route in ROUTES}
_STATUS_LINES: Final = {
    status.value: b"HTTP/1.1 %d %s\r\n" % (status.value, status.phrase.encode())
    for status in HTTPStatus
}
_WHOLE: Final = (
    b"HTTP/1.1 200 OK\r\n%bcontent-type: %b\r\nx-request-id: %b\r\ncontent-length: %d\r\n%b\r\n%b"
)


class Line(Protocol):
    """The connection that carries a cycle."""

    transport: asyncio.Transport
    fd: int
    """Of the client's socket, if others may write to it; else -1."""

    def answered(self) -> None:
        """Go on with what the client asks next."""
        ...


class Carrying(Protocol):
    """What answers a request: told what becomes of its client."""

    def client_flows(self) -> None:
        """Go on: the client has taken what there was."""

    def client_gone(self) -> None:
        """Stop: the client has left."""


class Head:
    """What matters of a request's head."""

    __slots__ = (
        "content_type",
        "expects",
        "is_json",
        "length",
        "request_id",
        "resumable",
        "unframed",
    )

    def __init__(self, headers: Headers) -> None:
        self.content_type = b""
        self.length = -1
        """Of the body, in bytes; -1: it is not said."""
        self.request_id = b""
        """As the client gave it, if it did."""
        self.resumable = b""
        self.expects = False
        """The client waits to be told to go on."""
        self.unframed = False
        """The body comes in chunks."""
        for name, value in headers:
            if name == b"content-type":
                self.content_type = value
            elif name == b"content-length":
                self.length = int(value) if value.isdigit() else -1
            elif name == b"x-request-id":
                self.request_id = value
            elif name == b"x-redmesh-resumable":
                self.resumable = value
            elif name == b"expect":
                self.expects = True
            elif name == b"transfer-encoding":
                self.unframed = True
        self.is_json = self.content_type.startswith(b"application/json") or self._is_json()

    def _is_json(self) -> bool:
        media_type = self.media_type
        return media_type.startswith("application/") and media_type.endswith("json")

    @property
    def media_type(self) -> str:
        """The content type without its parameters."""
        return self.content_type.partition(b";")[0].strip().lower().decode("latin-1")


class DirectCycle:
    """One request on a connection, and its answer."""

    __slots__ = (
        "_answer_head",
        "_body",
        "_carrying",
        "_chunked",
        "_default_lines",
        "_enter",
        "_line",
        "began_s",
        "ended",
        "head",
        "keep_alive",
        "more_body",
        "request_id",
        "response_complete",
        "route",
        "stalled",
        "started",
    )

    def __init__(
        self,
        line: Line,
        route: Route,
        head: Head,
        enter: Callable[["DirectCycle", bytes], Carrying | None],
        default_lines: bytes,
        began_s: float,
        *,
        keep_alive: bool,
    ) -> None:
        self._line = line
        self._enter = enter
        self._default_lines = default_lines
        """Of every answer's head."""
        self._body: bytes | bytearray = b""
        self._carrying: Carrying | None = None
        self._answer_head = b""
        self._chunked = False
        self.route = route
        self.head = head
        """Perhaps that of other requests, too: it is only read."""
        self.request_id = head.request_id
        self.began_s = began_s
        self.keep_alive = keep_alive
        self.more_body = True
        self.started = False
        """The head has been written: there is no way back."""
        self.response_complete = False
        self.ended = False
        self.stalled = False
        """The client is slower than what is written: no more should be produced for now."""

    # the request

    def body_came(self, data: bytes) -> None:
        """Take a piece of the body."""
        if self.response_complete:
            return
        if not self._body:
            self._body = data
        elif isinstance(self._body, bytearray):
            self._body += data
        else:
            self._body = bytearray(self._body)
            self._body += data

    def body_ended(self) -> None:
        """Begin to answer."""
        self.more_body = False
        if self.response_complete:
            return
        body, self._body = bytes(self._body), b""
        self.body_is(body)

    def body_is(self, body: bytes) -> None:
        """Begin to answer a request of which the whole body has come."""
        self.more_body = False
        carrying = self._enter(self, body)
        if not self.response_complete:
            self._carrying = carrying

    def lost(self) -> None:
        """Tell whoever answers that the client has left."""
        carrying, self._carrying = self._carrying, None
        complete, self.response_complete = self.response_complete, True
        if carrying is not None and not complete:
            carrying.client_gone()

    def flows(self) -> None:
        """Tell whoever answers that the client has taken what there was."""
        if self._carrying is not None:
            self._carrying.client_flows()

    # the answer (client.Outlet)

    def start(self, status: int, headers: Headers) -> None:
        """Begin the answer; its head travels with the first piece of its body."""
        self.started = True
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status, self._default_lines]
        chunked = status != BODILESS
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
            if name == b"content-length":
                chunked = False
            elif name == b"connection" and value == b"close":
                self.keep_alive = False
        if chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self._chunked = chunked
        self._answer_head = b"".join(lines)

    def write(self, body: bytes, *, more: bool) -> None:
        """Write a piece of the body; the last one with `more` false."""
        if self._chunked:
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
            if not more:
                body += LAST_CHUNK
        self._send(body, more=more)

    def write_whole(self, content_type: bytes, body: bytes) -> None:
        """Write the usual whole answer, with status 200, at once: most requests have one."""
        if self.response_complete:
            return  # the client has left
        self.started = self.ended = self.response_complete = True
        self._carrying = None
        line = self._line
        line.transport.write(
            _WHOLE
            % (
                self._default_lines,
                content_type,
                self.request_id,
                len(body),
                b"" if self.keep_alive else b"connection: close\r\n",
                body,
            )
        )
        if not self.keep_alive:
            line.transport.close()
        line.answered()

    def write_chunks(self, chunks: bytes, *, more: bool) -> None:
        """Write chunks that are framed already; with `more` false they end with the last one."""
        self._send(chunks, more=more)

    def lend(self) -> int:
        """Give the client's socket's descriptor, if its answer is in chunks and all of it is sent.

        Until the answer goes on by `write`, whoever has the descriptor writes whole chunks to it.
        """
        line = self._line
        if (
            self.response_complete
            or self.stalled
            or not self._chunked
            or self._answer_head
            or line.transport.is_closing()
            or line.transport.get_write_buffer_size()
        ):
            return -1
        return line.fd

    def _send(self, data: bytes, *, more: bool) -> None:
        if self.response_complete:
            return  # the client has left
        if self._answer_head:
            data = self._answer_head + data
            self._answer_head = b""
        line = self._line
        if data:
            line.transport.write(data)
        if not more:
            self.ended = self.response_complete = True
            self._carrying = None
            if not self.keep_alive:
                line.transport.close()
            line.answered()

    def cut(self) -> None:
        """End the answer without its end: the client sees that it broke off."""
        self._carrying = None
        self._line.transport.close()


class Lane:
    """Takes requests into the lane, or leaves them to the application."""

    def __init__(
        self,
        enter: Callable[[DirectCycle, bytes], Carrying | None],
        refuse: Callable[[DirectCycle, Refusal], None],
        *,
        max_body_bytes: int,
        body_timeout_s: float,
    ) -> None:
        self._enter = enter
        self._refuse = refuse
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._default_headers: Headers | None = None
        self._default_lines = b""

    def take(
        self,
        line: Line,
        url: bytes,
        headers: Headers,
        default_headers: Headers,
        now_s: float,
        *,
        keep_alive: bool,
    ) -> DirectCycle | None:
        """Begin the cycle of a POST over HTTP/1.1 whose head is complete, if it is a usual one."""
        route = _BY_URL.get(url)
        if route is None:
            return None
        head = Head(headers)
        if (
            not 0 <= head.length <= self._max_body_bytes
            or head.resumable
            or head.expects
            or head.unframed
        ):
            return None
        lines = self._lines(default_headers)
        return DirectCycle(line, route, head, self._enter, lines, now_s, keep_alive=keep_alive)

    def repeat(
        self,
        line: Line,
        before: DirectCycle,
        body: bytes,
        default_headers: Headers,
        now_s: float,
    ) -> DirectCycle | None:
        """Begin the cycle of a request whose head is that of the one `before` it."""
        if len(body) > self._max_body_bytes:
            return None
        if default_headers is self._default_headers:
            lines = self._default_lines
        else:
            lines = self._lines(default_headers)
        return DirectCycle(
            line, before.route, before.head, self._enter, lines, now_s, keep_alive=True
        )

    def _lines(self, headers: Headers) -> bytes:
        """Write headers as lines; uvicorn makes a new list of them when the date changes."""
        if headers is not self._default_headers:
            self._default_headers = headers
            self._default_lines = b"".join([b"%b: %b\r\n" % pair for pair in headers])
        return self._default_lines

    def sweep(self, cycle: DirectCycle, now_s: float) -> None:
        """Refuse a request whose body takes too long to come."""
        if cycle.more_body and now_s - cycle.began_s > self._body_timeout_s:
            cycle.more_body = False
            self._refuse(cycle, body_too_slow(self._body_timeout_s))
