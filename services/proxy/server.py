"""The public port: uvicorn with limits of ours, on a socket that we bind ourselves.

uvicorn sets no limit to a request's head and waits for ever for its first byte; both are bounded
here. At its end it closes idle connections at once, whatever may be on its way; ours end in stages
(see `draining`). Signals belong to the service, not to the server.
"""

import asyncio
import contextlib
import logging
import socket
import sys
from collections import deque
from collections.abc import Generator
from http import HTTPStatus
from typing import Any, Final, cast

import httptools
import uvicorn
from litestar import Litestar
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from services.proxy.draining import CROSSING_S, IDLE_S, Ending, Refuser
from services.proxy.refusals import Refusal
from services.proxy.settings import ProxySettings
from services.proxy.upstream import BOUNDARY_HEADERS
from shared.errors import RedmeshError

SWEEP_S: Final = 1.0
LEAVE_SWEEP_S: Final = 0.05
LINGER_S: Final = 30.0
BACKLOG: Final = 4096
IDLE_SLACK_S: Final = 2.0
"""uvicorn closes an idle connection politely; this much later it is cut."""
STOP_S: Final = 5.0
"""After answers were ended at the drain deadline, their last bytes get this long."""


class PortTakenError(RedmeshError):
    """The public port cannot be bound."""


class _HeadTooLargeError(Exception):
    """Raised inside the parser to stop it."""


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Bind the public port; raises PortTakenError with one clear line.

    With `shared` other processes bind it, too, and nobody listens yet: the kernel would give this
    socket its share of the connections before somebody takes them.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise PortTakenError(
            f"cannot resolve --host {host!r}: {error.strerror or error}"
        ) from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind(address)
        if not shared:
            bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise PortTakenError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; "
            "stop what uses it, or give another --port"
        ) from error
    bound.setblocking(False)
    return bound


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with the head of a request bounded in size and in time."""

    limits: ProxySettings
    ending: Ending
    refuser: Refuser

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - uvicorn's own
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._unparsed_bytes = 0
        self._in_head = False
        self._too_large = False
        self._received = self._rest = b""
        self._resuming = False
        self._unanswered: deque[RequestResponseCycle] = deque()
        self._idle_cycle: RequestResponseCycle | None = None
        self._idle_since_s = 0.0
        self.head_since_s: float | None = None
        self.closing_since_s: float | None = None
        self.stalled_since_s: float | None = None
        self.half_closed_s: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a head."""
        super().connection_made(cast("asyncio.Transport", transport))
        self.head_since_s = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every request of this connection; uvicorn tells the last one only."""
        for cycle in self._unanswered:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self._unanswered.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and measure a head of which the parser has not shown anything yet."""
        if self.half_closed_s is not None:
            return  # it crossed our end; the client sees that, and asks elsewhere
        in_head = self._in_head
        self._received = data
        while self._received:
            self._rest = b""
            super().data_received(self._received)
            self._received = self._rest
        if not (in_head and self._in_head):
            self._unparsed_bytes = 0
            return
        self._unparsed_bytes += len(data)
        if self._unparsed_bytes > self.limits.max_header_bytes and not self.transport.is_closing():
            self._too_large = True
            self.send_400_response("")

    def _unsupported_upgrade_warning(self) -> None:
        """Go on with HTTP/1.1, where uvicorn would drop the body and all that follows.

        The parser stops where another protocol would begin; a new one is told how this request's
        body is framed, and takes the rest. Java's client asks for h2c with every first request.
        """
        offset = cast("httptools.HttpParserUpgrade", sys.exc_info()[1]).args[0]
        framing = [pair for pair in self.headers if pair[0] in BOUNDARY_HEADERS]
        self.parser = httptools.HttpRequestParser(self)
        self._resuming = True
        head = b"".join(b"%s: %s\r\n" % pair for pair in framing)
        self.parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % head)
        self._rest = self._received[offset:]

    def on_message_begin(self) -> None:
        """Begin to measure a head."""
        if self._resuming:
            return
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        if self.head_since_s is None:
            self.head_since_s = self.loop.time()

    def on_url(self, url: bytes) -> None:
        """Measure, then parse."""
        if self._resuming:
            return
        self._grow(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Measure, then parse."""
        if self._resuming:
            return
        self._grow(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop waiting for the head."""
        if self._resuming:
            self._resuming = False
            return
        self._in_head = False
        self.head_since_s = None
        if self.ending.refusing:
            self.app = cast("Any", self.refuser)
        super().on_headers_complete()
        if self.ending.leaving:
            self.cycle.keep_alive = False
        while self._unanswered and self._unanswered[0].response_complete:
            self._unanswered.popleft()
        self._unanswered.append(self.cycle)

    def on_message_complete(self) -> None:
        """Note the end of the body, unless the parser has merely stopped before it."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - ours says more
        """Refuse in our own shape."""
        status = 431 if self._too_large else 400
        refusal = Refusal(
            status=status,
            message=f"the request's head is larger than {self.limits.max_header_bytes} bytes"
            if self._too_large
            else "this is not an HTTP/1.1 request",
            code="head_too_large" if self._too_large else "bad_request",
        )
        body = refusal.body()
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%s"
            % (status, HTTPStatus(status).phrase.encode(), len(body), body)
        )
        self.transport.close()

    def leave(self) -> None:
        """Say with the next answer that it is this connection's last one."""
        if self._unanswered and not self._unanswered[-1].response_started:
            self._unanswered[-1].keep_alive = False

    def shutdown(self) -> None:
        """Do nothing: uvicorn would close an idle connection under a request on its way."""

    def leave_if_idle(self, now_s: float) -> None:
        """Half-close a connection on which nothing is asked, and close it a moment later."""
        unheard_s = self.ending.unheard_s
        if unheard_s is None or self.transport.is_closing():
            return
        if self.half_closed_s is not None:
            if now_s - self.half_closed_s > CROSSING_S:
                self.transport.close()
            return
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is None and self.head_since_s is not None:
            idle_since_s = self.head_since_s
        elif cycle is not None and cycle.response_complete:
            idle_since_s = now_s - self._idle_for_s(now_s)
        else:
            return
        if not self._in_head and now_s - max(idle_since_s, unheard_s) > IDLE_S:
            self.half_closed_s = now_s
            self.transport.write_eof()

    def pause_writing(self) -> None:
        """Begin to measure how long the client takes nothing."""
        self.stalled_since_s = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Stop measuring: the client has taken something."""
        self.stalled_since_s = None
        super().resume_writing()

    def overdue(self, now_s: float) -> bool:
        """Tell whether the client has taken too long: to send a head, to read, or to leave."""
        if self.transport.is_closing():
            if self.closing_since_s is None:
                self.closing_since_s = now_s
            return now_s - self.closing_since_s > LINGER_S
        since_s = self.stalled_since_s
        if since_s is not None and now_s - since_s > self.limits.client_stall_timeout_s:
            return True
        since_s = self.head_since_s
        if since_s is not None:
            return now_s - since_s > self.limits.header_timeout_s
        return self._idle_for_s(now_s) > self.limits.client_keep_alive_s + IDLE_SLACK_S

    def _idle_for_s(self, now_s: float) -> float:
        """Say for how long nothing has been asked, whatever bytes still came.

        uvicorn's own timer ends with the next byte, such as the rest of a refused body.
        """
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is None or not cycle.response_complete:
            return 0.0
        if cycle is not self._idle_cycle:
            self._idle_cycle = cycle
            self._idle_since_s = now_s
        return now_s - self._idle_since_s

    def _grow(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.limits.max_header_bytes:
            self._too_large = True
            raise _HeadTooLargeError


class Server(uvicorn.Server):
    """uvicorn, with signals left to the service, and an end in stages."""

    def __init__(self, config: uvicorn.Config, ending: Ending) -> None:
        super().__init__(config)
        self.ending = ending

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave signals alone."""
        yield

    def leave(self) -> None:
        """Say with every answer from now on that it is the last one of its connection."""
        self.ending.leaving = True
        for connection in self._connections():
            connection.leave()

    def refuse(self) -> None:
        """Answer 503 to whatever is asked from now on."""
        self.ending.refusing = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening; return once the last connection has ended."""
        loop = asyncio.get_running_loop()
        # Who waits to be accepted believes to be connected, and would be reset.
        late = [accepted for each in sockets or () for accepted in _accept_all(each)]
        self.ending.unheard_s = loop.time()
        async with asyncio.TaskGroup() as group:
            for accepted in late:
                group.create_task(self._take(accepted))
            leaving = group.create_task(self._leave_idle())
            await super().shutdown(sockets)
            leaving.cancel()

    async def sweep_connections(self) -> None:
        """Close the connections of clients that take too long, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = loop.time()
            for connection in self._connections():
                if connection.overdue(now_s):
                    connection.transport.abort()

    async def _take(self, accepted: socket.socket) -> None:
        made = self.config.http_protocol_class
        with contextlib.suppress(OSError):  # it may have left already
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: cast("Any", made)(
                    config=self.config,
                    server_state=self.server_state,
                    app_state=self.lifespan.state,
                ),
                accepted,
            )

    async def _leave_idle(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LEAVE_SWEEP_S)
            now_s = loop.time()
            for connection in self._connections():
                connection.leave_if_idle(now_s)

    def _connections(self) -> list[LimitedProtocol]:
        return cast("list[LimitedProtocol]", list(self.server_state.connections))


def make_server(app: Litestar, settings: ProxySettings) -> Server:
    """Make the server of the public port."""
    # A cut answer is meant to end without its end; uvicorn calls that a fault of the application.
    logging.getLogger("uvicorn.error").addFilter(_not_about_cut_answers)
    ending = Ending()

    class Protocol(LimitedProtocol):
        limits = settings

    Protocol.ending = ending
    Protocol.refuser = Refuser(app, ending, max_body_bytes=settings.max_body_bytes)
    config = uvicorn.Config(
        cast("Any", app),
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=settings.client_keep_alive_s,
        timeout_graceful_shutdown=round(settings.drain_timeout_s + STOP_S),
    )
    return Server(config, ending)


def _accept_all(listening: socket.socket) -> list[socket.socket]:
    """Accept every connection that the kernel has made already."""
    accepted: list[socket.socket] = []
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listening.accept()
            connection.setblocking(False)
            accepted.append(connection)
    return accepted


def _not_about_cut_answers(record: logging.LogRecord) -> bool:
    return "without completing response" not in record.getMessage()
