"""A client's connection: uvicorn's protocol, with limits of ours and the fast lane.

uvicorn sets no limit to a request's head and waits for ever for its first byte; both are bounded
here. Usual requests are answered in this protocol's own callbacks (see `lane`); all others become
tasks of the application, as uvicorn has it. Idle connections end by a sweep instead of a timer for
each answer.
"""

import asyncio
import sys
from collections import deque
from http import HTTPStatus
from typing import Any, Final, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from services.proxy.carrier.carrying import descriptor
from services.proxy.draining import CROSSING_S, IDLE_S, Ending, Refuser
from services.proxy.familiar import END, FamiliarHead, familiar
from services.proxy.lane import DirectCycle, Lane
from services.proxy.refusals import Refusal
from services.proxy.settings import ProxySettings
from services.proxy.upstream import BOUNDARY_HEADERS

LINGER_S: Final = 30.0
MISSES: Final = 8
"""A client whose heads differ each time is not compared any more."""


class _HeadTooLargeError(Exception):
    """Raised inside the parser to stop it."""


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with the head of a request bounded in size and in time."""

    limits: ProxySettings
    ending: Ending
    refuser: Refuser
    lane: Lane | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - uvicorn's own
        super().__init__(*args, **kwargs)
        self.fd = -1
        self._unparsed_bytes = 0
        self._spans = False
        """The head came in more than one read."""
        self._in_head = False
        self._too_large = False
        self._received = self._rest = b""
        self._resuming = False
        self._between = True
        """The parser is at the end of a request."""
        self._aligned = True
        """So it was when this read came."""
        self._begun = 0
        """Requests that began in this read."""
        self._familiar: FamiliarHead | None = None
        """The head of the last request, where that was a usual one and a read by itself.

        While there is one, the parser is at the end of a request."""
        self._misses = 0
        self._unanswered: deque[RequestResponseCycle | DirectCycle] = deque()
        self._idle_cycle: RequestResponseCycle | DirectCycle | None = None
        self._idle_since_s = 0.0
        self.head_since_s: float | None = None
        self.closing_since_s: float | None = None
        self.stalled_since_s: float | None = None
        self.half_closed_s: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a head."""
        super().connection_made(cast("asyncio.Transport", transport))
        self.fd = descriptor(transport)
        self.head_since_s = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every request of this connection; uvicorn tells the last one only."""
        for cycle in self._unanswered:
            if isinstance(cycle, DirectCycle):
                cycle.lost()
            elif not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self._unanswered.clear()
        if isinstance(self.cycle, DirectCycle):
            self.cycle = cast("Any", None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and measure a head of which the parser has not shown anything yet."""
        if self.half_closed_s is not None:
            return  # it crossed our end; the client sees that, and asks elsewhere
        known = self._familiar
        if known is not None:
            body = known.body_of(data)
            if body is not None and self._again(body):
                self._misses = 0
                return
            self._familiar = None
            self._misses += 1
        self._aligned = self._between
        self._begun = 0
        in_head = self._in_head
        self._received = data
        try:
            upgrade = self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("")
            return
        if upgrade:
            if self._rest:
                rest, self._rest = self._rest, b""
                self.data_received(rest)
            return
        self._received = b""
        if not self._in_head:
            return
        self._spans = True
        self._unparsed_bytes += len(data) if in_head else 0
        if self._unparsed_bytes > self.limits.max_header_bytes and not self.transport.is_closing():
            self._too_large = True
            self.send_400_response("")

    def _parse(self, data: bytes) -> bool:
        """Feed the parser; tell whether it has stopped where another protocol would begin."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._unsupported_upgrade_warning()
            return True
        return False

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
        self._between = False
        self._begun += 1
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._in_head = True
        self._spans = False
        self._unparsed_bytes = 0
        if self.head_since_s is None:
            self.head_since_s = self.loop.time()

    def on_url(self, url: bytes) -> None:
        """Keep the target, which may come in pieces."""
        if not self._resuming:
            self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        if not self._resuming:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Stop waiting for the head."""
        if self._resuming:
            self._resuming = False
            return
        self._in_head = False
        self.head_since_s = None
        if self._spans or len(self._received) > self.limits.max_header_bytes:
            self._measure_head()
        cycle = self._direct()
        if cycle is None:
            self._to_application()
            cycle = self.cycle
        else:
            cycle.stalled = self.stalled_since_s is not None
            self.cycle = cast("Any", cycle)
        if self.ending.leaving:
            cycle.keep_alive = False
        unanswered = self._unanswered
        while unanswered and unanswered[0].response_complete:
            unanswered.popleft()
        unanswered.append(cycle)

    def _direct(self) -> DirectCycle | None:
        """Take the request into the lane, if it is a usual one and nothing is before it."""
        parser = self.parser
        before = cast("RequestResponseCycle | DirectCycle | None", self.cycle)
        if (
            self.lane is None
            or self.ending.refusing
            or (before is not None and not before.response_complete)
            or parser.get_method() != b"POST"
            or parser.get_http_version() != "1.1"
            or parser.should_upgrade()
        ):
            return None
        return self.lane.take(
            self,
            self.url,
            self.headers,
            self.server_state.default_headers,
            self.loop.time(),
            keep_alive=parser.should_keep_alive(),
        )

    def _to_application(self) -> None:
        """Have uvicorn go on with this request, as it would have from its beginning."""
        if self.ending.refusing:
            self.app = cast("Any", self.refuser)
        url, headers = self.url, self.headers
        super().on_message_begin()
        for name, value in headers:
            super().on_header(name, value)
        self.url = url
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Hand on a piece of the body."""
        cycle = cast("RequestResponseCycle | DirectCycle", self.cycle)
        if isinstance(cycle, DirectCycle):
            cycle.body_came(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Note the end of the body, unless the parser has merely stopped before it."""
        cycle = cast("RequestResponseCycle | DirectCycle", self.cycle)
        if isinstance(cycle, DirectCycle):
            self._between = True
            cycle.body_ended()
            if self._aligned and self._begun == 1 and self._misses < MISSES:
                self._remember(self._received)
        elif not self.parser.should_upgrade():
            self._between = True
            super().on_message_complete()

    def _remember(self, message: bytes) -> None:
        """Remember the head of a read, if that was one whole request."""
        known = familiar(message[: message.find(END) + len(END)])
        if known is not None and known.body_of(message) is not None:
            self._familiar = known

    def _again(self, body: bytes) -> bool:
        """Begin the request that came with a familiar head; False if it has to be parsed."""
        lane, ending = self.lane, self.ending
        before: object = self.cycle
        if (
            lane is None
            or ending.refusing
            or ending.leaving
            or not isinstance(before, DirectCycle)
            or not before.response_complete
        ):
            return False
        default_headers = self.server_state.default_headers
        cycle = lane.repeat(self, before, body, default_headers, self.loop.time())
        if cycle is None:
            return False
        cycle.stalled = self.stalled_since_s is not None
        taken: Any = cycle
        self.cycle = taken
        self._unanswered.clear()
        self._unanswered.append(cycle)
        cycle.body_is(body)
        return True

    def answered(self) -> None:
        """Go on with what was asked meanwhile; idle connections end by the sweep, not by timers."""
        if self.pipeline:
            super().on_response_complete()

    def on_response_complete(self) -> None:
        """Do the same after an answer of the application."""
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
        else:
            self.flow.resume_reading()

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
        last = self._unanswered[-1] if self._unanswered else None
        if last is not None and not (
            last.started if isinstance(last, DirectCycle) else last.response_started
        ):
            last.keep_alive = False

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
        cycle = cast("RequestResponseCycle | DirectCycle | None", self.cycle)
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
        cycle = cast("RequestResponseCycle | DirectCycle | None", self.cycle)
        if isinstance(cycle, DirectCycle):
            cycle.stalled = True

    def resume_writing(self) -> None:
        """Stop measuring: the client has taken something."""
        self.stalled_since_s = None
        super().resume_writing()
        cycle = cast("RequestResponseCycle | DirectCycle | None", self.cycle)
        if isinstance(cycle, DirectCycle):
            cycle.stalled = False
            cycle.flows()

    def sweep(self, now_s: float) -> None:
        """End what takes too long; an idle connection, and a slow request, politely."""
        if self.overdue(now_s):
            self.transport.abort()
            return
        cycle = cast("RequestResponseCycle | DirectCycle | None", self.cycle)
        if self._idle_for_s(now_s) > self.limits.client_keep_alive_s:
            self.transport.close()
        elif self.lane is not None and isinstance(cycle, DirectCycle):
            self.lane.sweep(cycle, now_s)

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
        return since_s is not None and now_s - since_s > self.limits.header_timeout_s

    def _idle_for_s(self, now_s: float) -> float:
        """Say for how long nothing has been asked, whatever bytes still came."""
        cycle = cast("RequestResponseCycle | DirectCycle | None", self.cycle)
        if cycle is None or not cycle.response_complete:
            return 0.0
        if cycle is not self._idle_cycle:
            self._idle_cycle = cycle
            self._idle_since_s = now_s
        return now_s - self._idle_since_s

    def _measure_head(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.max_header_bytes:
            self._too_large = True
            raise _HeadTooLargeError
