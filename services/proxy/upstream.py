"""One HTTP/1.1 connection to a replica: our own lean client on asyncio's protocols.

A request is written in one piece; the answer is parsed by llhttp and handed on once per read, not
once per chunk or event. The chunks of an event stream are only counted off (`framing`). The
connection says how an answer ended: `complete` only when the framing says so, so that a cut answer
is never taken for a whole one.
"""

import asyncio
from typing import Final, NamedTuple, Protocol, cast

import httptools

from services.proxy.carrier.carrying import Carried, descriptor
from services.proxy.familiar import END, MAX_BYTES, FamiliarHead, familiar
from services.proxy.framing import Chunks

EVENT_STREAM: Final = b"text/event-stream"
BOUNDARY_HEADERS: Final = frozenset({b"content-length", b"transfer-encoding"})
BODILESS: Final = frozenset({204, 304})
"""Statuses of answers that end with their head."""


class Head(NamedTuple):
    """What matters of an answer's head."""

    status: int
    content_type: bytes = b""
    retry_after: bytes = b""
    framed: bool = True
    """The answer says where it ends; otherwise it ends with the connection, whole or not."""
    in_chunks: bool = False
    """It is an event stream that can be handed on in the chunks in which it comes."""


class Sink(Protocol):
    """Who listens to the answer of one request."""

    def answer_started(self, head: "Head") -> bool:
        """Take the head of the answer; tell whether an event stream is wanted in its chunks."""
        ...

    def answer_data(self, data: bytes, *, complete: bool) -> None:
        """Take the next bytes of the body; `complete` with the last ones (which may be empty).

        Where chunks are wanted (and come as chunks), these are whole ones, the last one included.
        """
        ...

    def answer_lost(self, reason: str, *, stale: bool) -> None:
        """Learn that the connection ended before the answer did.

        `stale`: a reused connection ended without one byte, most likely closed by the replica
        while the request was on its way.
        """
        ...


class Familiar:
    """The last heads of a replica's whole answers and of its streams, and what they say.

    Shared by all connections to the replica: within a second, all its answers have the same.
    """

    __slots__ = ("answer", "stream", "stream_bytes", "stream_head", "whole")

    def __init__(self) -> None:
        self.whole: FamiliarHead | None = None
        self.answer = Head(0)
        self.stream_head = b""
        self.stream_bytes = 0
        self.stream = Head(0)


class Idler(Protocol):
    """Who owns connections between requests."""

    familiar: Familiar

    def idle(self, connection: "Connection") -> None:
        """Take back a connection that can carry another request."""
        ...

    def gone(self, connection: "Connection") -> None:
        """Forget a connection that has ended."""
        ...


class Connection(asyncio.Protocol):
    """A connection to one replica; carries one request at a time."""

    __slots__ = (
        "_chunked",
        "_chunks",
        "_complete",
        "_content_type",
        "_familiar",
        "_fd",
        "_framed",
        "_fresh",
        "_got_bytes",
        "_head_due",
        "_keep_alive",
        "_owner",
        "_parser",
        "_parts",
        "_paused",
        "_retry_after",
        "_reused",
        "_sink",
        "_status",
        "_transport",
        "carried",
        "idle_since_s",
    )

    def __init__(self, owner: Idler) -> None:
        self._owner = owner
        self._familiar = owner.familiar
        self._fd = -1
        """Of the socket, if it can be lent."""
        self._fresh = True
        """The parser has read nothing but whole answers."""
        self._transport: asyncio.Transport | None = None
        self._sink: Sink | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._status = 0
        self._content_type = b""
        self._retry_after = b""
        self._framed = False
        self._chunked = False
        self._chunks: Chunks | None = None
        """Set while an event stream comes in chunks."""
        self._head_due = False
        self._keep_alive = False
        self._complete = False
        self._got_bytes = False
        self._reused = False
        self._paused = False
        self.carried: Carried | None = None
        """Set while the library reads this connection's stream."""
        self.idle_since_s = 0.0

    @property
    def usable(self) -> bool:
        """Tell whether a request may be sent now."""
        transport = self._transport
        return transport is not None and self._sink is None and not transport.is_closing()

    def send(self, sink: Sink, request: bytes) -> None:
        """Send `request`, and hand the answer to `sink`."""
        transport = self._transport
        if transport is None:
            raise RuntimeError("the connection is not made")
        self._sink = sink
        self._got_bytes = False
        self._complete = False
        transport.write(request)

    def pause(self) -> None:
        """Stop reading until `resume`: the client is slower than the replica."""
        if self._transport is not None and not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._transport is not None and self._paused and not self._transport.is_closing():
            self._transport.resume_reading()
        self._paused = False

    @property
    def heard_s(self) -> float:
        """When the last carried bytes came, on the loop's clock; 0 where none are carried now."""
        return 0.0 if self.carried is None else self.carried.heard_s

    def lend(self, listener: object) -> int:
        """Stop reading a stream between two chunks; give its socket's descriptor, else -1.

        `listener` is the sink that is meant: by now there may be another one, or none.
        """
        transport, chunks = self._transport, self._chunks
        if (
            transport is None
            or self._fd < 0
            or transport.is_closing()
            or self._paused
            or self._sink is not listener
            or chunks is None
            or not chunks.between
        ):
            return -1
        transport.pause_reading()
        return self._fd

    def take_back(self, data: bytes) -> None:
        """Read again, after `data`, which was read while the connection was lent."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
        if data:
            self.data_received(data)

    def carried_whole(self) -> None:
        """Tell that all of the answer has come, after its last bytes were carried."""
        sink, transport = self._sink, self._transport
        if sink is None or transport is None:
            return
        if not transport.is_closing():
            transport.resume_reading()
        self._complete = True
        self._finish()
        sink.answer_data(b"", complete=True)

    def give_up(self) -> None:
        """Close at once; the sink learns that the answer is lost."""
        if self._transport is not None:
            self._transport.abort()

    def abort(self) -> None:
        """Close at once; an engine takes this for a cancellation. The sink hears no more."""
        self._sink = None
        if self.carried is not None:
            self.carried.end()
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport: uvloop sets TCP_NODELAY, and its class is no asyncio.Transport."""
        self._transport = cast("asyncio.Transport", transport)
        self._fd = descriptor(transport)

    def data_received(self, data: bytes) -> None:
        """Parse, then deliver once."""
        sink = self._sink
        if sink is None:
            # Bytes that nobody asked for: the connection is out of step.
            self.abort()
            return
        try:
            if self._chunks is not None:
                body = self._chunks.take(data)
                self._complete = self._chunks.ended
            elif self._fresh and (known := self._recognised(sink, data)) is not None:
                body = known
            else:
                self._got_bytes = True
                body = self._parse(sink, data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ValueError) as error:
            self.abort()
            sink.answer_lost(f"the replica's answer is not HTTP: {error}", stale=False)
            return
        complete = self._complete
        if not body and not complete:
            return
        if self._sink is not sink:
            return  # the sink gave up on hearing the head
        if complete:
            self._finish()
        sink.answer_data(body, complete=complete)

    def _recognised(self, sink: Sink, data: bytes) -> bytes | None:
        """Take the beginning of an answer whose head is a familiar one; None of any other."""
        known = self._familiar
        whole = known.whole
        if whole is not None and (body := whole.body_of(data)) is not None:
            self._got_bytes = self._complete = self._keep_alive = True
            sink.answer_started(known.answer)
            return body
        if known.stream_bytes and data.startswith(known.stream_head):
            self._got_bytes = self._framed = self._keep_alive = True
            self._status = known.stream.status
            return self._streamed(sink, known.stream, data[known.stream_bytes :])
        return None

    def _streamed(self, sink: Sink, head: Head, rest: bytes) -> bytes:
        """Begin to take an event stream in chunks; a parser that has read its head is left."""
        as_chunks = sink.answer_started(head)
        if self._sink is not sink:
            return b""
        self._chunks = Chunks(framed=as_chunks)
        body = self._chunks.take(rest)
        self._complete = self._chunks.ended
        return body

    def _remember(self, head: Head, text: bytes) -> None:
        """Remember the head of an answer of the usual kinds."""
        known = self._familiar
        if not self._keep_alive:
            return
        if head.in_chunks:
            if len(text) <= MAX_BYTES:
                known.stream, known.stream_head, known.stream_bytes = head, text, len(text)
        elif head.framed and not self._chunked:
            known.whole, known.answer = familiar(text), head

    def _parse(self, sink: Sink, data: bytes) -> bytes:
        """Have llhttp parse what is read; an event stream that begins leaves it after its head."""
        fresh, self._fresh = self._fresh, False
        feed = self._parser.feed_data
        if self._status:
            feed(data)
        else:
            end, rest = 0, data
            while rest and not self._head_due:  # once, or again after an interim head
                end = rest.find(END) + len(END)
                if end < len(END):
                    end = 0  # the head begins or ends here, or goes on
                feed(rest[:end] if end else rest)
                rest = rest[end:] if end else b""
            if self._head_due:
                self._head_due = False
                in_chunks = (
                    self._chunked
                    and end > 0
                    and self._content_type.startswith(EVENT_STREAM)
                    # Else a head that ended within this read was taken to end later.
                    and not self._parts
                    and not self._complete
                )
                head = Head(
                    self._status, self._content_type, self._retry_after, self._framed, in_chunks
                )
                if fresh and end and end + len(rest) == len(data) and head.status == 200:
                    self._remember(head, data[:end])
                if in_chunks:
                    self._parser = httptools.HttpResponseParser(self)
                    return self._streamed(sink, head, rest)
                sink.answer_started(head)
                if self._sink is not sink:
                    return b""
            if rest:
                feed(rest)
        parts = self._parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        return body

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the sink: a body without framing is complete now, any other was cut."""
        if self.carried is not None:
            self.carried.end()
        self._owner.gone(self)
        sink = self._sink
        self._sink = None
        if sink is None:
            return
        if exc is None and self._status and not self._framed and self._got_bytes:
            sink.answer_data(b"", complete=True)
            return
        stale = self._reused and not self._got_bytes
        sink.answer_lost(str(exc) if exc else "the connection was closed", stale=stale)

    # httptools' callbacks

    def on_message_begin(self) -> None:
        """Begin a new answer; raises ValueError for one that nobody asked for."""
        if self._complete:
            raise ValueError("it answered twice")
        self._status = 0
        self._content_type = b""
        self._retry_after = b""
        self._framed = False
        self._chunked = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep the few headers that matter."""
        lowered = name.lower()
        if lowered == b"content-type":
            self._content_type = value
        elif lowered in BOUNDARY_HEADERS:
            self._framed = True
            self._chunked = value.lower() == b"chunked"
        elif lowered == b"retry-after":
            self._retry_after = value

    def on_headers_complete(self) -> None:
        """Note the head, unless it is an interim one; raises ValueError for no status at all."""
        status = self._parser.get_status_code()
        if not 100 <= status <= 599:
            raise ValueError(status)
        if status in BODILESS:
            self._framed = True
        if status >= 200:
            self._status = status
            self._head_due = True
            # Asked here: an event stream's end is not seen by the parser.
            self._keep_alive = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        """Collect a piece of the body."""
        self._parts.append(body)

    def on_message_complete(self) -> None:
        """Note the end of the answer."""
        if self._status >= 200:
            self._complete = True

    def _finish(self) -> None:
        self._sink = None
        self._chunks = None
        self._status = 0
        self._fresh = self._reused = True
        if self._paused:
            self.resume()
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._keep_alive:
            self._owner.idle(self)
        else:
            transport.close()
