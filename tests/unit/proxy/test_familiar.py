"""Familiar heads: recognised for what the parser took them for, and nothing else ever is."""

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import httptools
import pytest
from uvicorn.server import ServerState

from services.proxy import protocol as protocols
from services.proxy.familiar import MAX_BYTES, FamiliarHead, familiar
from services.proxy.lane import DirectCycle, Lane
from services.proxy.protocol import MISSES, LimitedProtocol
from services.proxy.refusals import Refusal
from services.proxy.server import make_server
from services.proxy.settings import ProxySettings
from services.proxy.upstream import Connection, Familiar, Head
from shared.secret import Secret

HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nContent-Length: %d\r\n"
    b"x-request-id: %b\r\n\r\n"
)


def known(head: bytes) -> FamiliarHead:
    """Remember a head that can be."""
    remembered = familiar(head)
    assert remembered is not None
    return remembered


def test_only_the_length_may_differ() -> None:
    """The body of any length is found, and none of a message that differs otherwise."""
    head = known(HEAD % (3, b"a"))
    for size in (0, 1, 9, 10, 99, 12345):
        message = HEAD % (size, b"a") + b"x" * size
        assert head.body_of(message) == b"x" * size
        assert head.body_of(message + b"x") is None
        assert head.body_of(message[:-1]) is None
        assert head.body_of(b"\r\n" + message) is None
    assert head.body_of(HEAD % (3, b"b") + b"abc") is None
    assert head.body_of(HEAD.replace(b"%d", b" %d") % (3, b"a") + b"abc") is None
    assert head.body_of(HEAD.replace(b"%d", b"%d, 3") % (3, b"a") + b"abc") is None
    assert head.body_of(HEAD.replace(b"%d", b"+%d") % (3, b"a") + b"abc") is None
    assert head.body_of(HEAD.replace(b"%d", b"0x%d") % (3, b"a") + b"abc") is None
    between = HEAD.replace(b"%d\r\n", b"%d\r\ntransfer-encoding: chunked\r\n")
    assert head.body_of(between % (3, b"a") + b"abc") is None


@pytest.mark.parametrize("at", range(len(HEAD % (3, b"a"))))
def test_no_other_byte_may_differ(at: int) -> None:
    """Each byte of a head but those of the length matters."""
    head = HEAD % (3, b"a")
    other = head[:at] + bytes([head[at] ^ 1]) + head[at + 1 :]
    if other[at : at + 1] != b"2":  # then it is the length that differs
        assert known(head).body_of(other + b"abc") is None
    assert known(head).body_of(other + b"ab") in {None, b"ab"}


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n\r\n",
        HEAD[:-2] % (3, b"a"),
        b"GET / HTTP/1.1\r\ncontent-length: 3\r\nContent-Length: 3\r\n\r\n",
        b"GET / HTTP/1.1\r\nfiller: %b\r\ncontent-length: 3\r\n\r\n" % (b"x" * MAX_BYTES),
    ],
)
def test_unusual_heads_are_not_remembered(head: bytes) -> None:
    """No length, two lengths, no end, or too much of it."""
    assert familiar(head) is None


class Transport:
    """Takes what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closing = False

    def write(self, data: bytes) -> None:
        """Keep it."""
        self.written += data

    def is_closing(self) -> bool:
        """Tell whether it was closed."""
        return self.closing

    def close(self) -> None:
        """Close."""
        self.closing = True

    abort = close

    def get_extra_info(self, _name: str, default: object = None) -> object:
        """Know nothing."""
        return default

    def pause_reading(self) -> None:
        """Do nothing."""

    resume_reading = pause_reading


class Desk:
    """Stands for the hot routes: answers at once, and keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes, bytes]] = []

    def enter(self, cycle: DirectCycle, body: bytes) -> None:
        """Answer."""
        self.asked.append((cycle.route.path, cycle.request_id, body))
        cycle.start(200, [(b"content-length", b"0")])
        cycle.write(b"", more=False)

    def refuse(self, cycle: DirectCycle, refusal: Refusal) -> None:
        """Refuse nothing."""
        raise AssertionError(refusal.message, cycle)


def connected(desk: Desk) -> LimitedProtocol:
    """Make the protocol of one client's connection, which nobody serves but `desk`."""
    settings = ProxySettings(fleet_secret=Secret("s" * 32))
    server = make_server(cast("Any", None), settings, cast("Any", desk))
    server.config.load()
    state = ServerState()
    state.default_headers = []
    made: Any = server.config.http_protocol_class
    protocol: LimitedProtocol = made(config=server.config, server_state=state, app_state={})
    protocol.connection_made(cast("Any", Transport()))
    return protocol


def some_requests(source: random.Random) -> list[tuple[str, bytes, bytes]]:
    """Make requests of a few kinds, some bodies of which look like requests."""
    inner = (HEAD % (5, b"evil")) + b"inner"
    bodies = (
        b"",
        b"{}",
        b'{"model":"demo"}',
        b"x" * 300,
        inner,
        inner * 2,
        b"\r\n\r\n",
        inner[:60],
    )
    return [
        ("/v1/chat/completions", source.choice((b"a", b"a", b"a", b"b")), source.choice(bodies))
        for _ in range(source.randrange(1, 12))
    ]


def cut(message: bytes, source: random.Random) -> Sequence[bytes]:
    """Cut bytes into reads."""
    places = sorted(source.sample(range(1, len(message)), min(len(message) - 1, 6)))
    return [message[a:b] for a, b in zip([0, *places], [*places, len(message)], strict=True)]


@pytest.mark.parametrize("seed", range(150))
async def test_requests_are_what_the_client_sent(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However requests are cut into reads, and whatever is in them, each is seen as it was sent."""
    source = random.Random(seed)
    sent = some_requests(source)
    messages = [HEAD % (len(body), name) + body for _, name, body in sent]
    way = source.choice(("whole", "together", "cut", "mixed"))
    reads: list[bytes] = []
    for message in messages:
        how = source.choice(("whole", "together", "cut")) if way == "mixed" else way
        if how == "together" and reads:
            reads[-1] += message
        elif how == "cut":
            reads += cut(message, source)
        else:
            reads.append(message)
    recognised = 0
    usual = Lane.repeat

    def counted(*given: Any) -> DirectCycle | None:  # noqa: ANN401 - as it is given
        nonlocal recognised
        recognised += 1
        return usual(*given)

    monkeypatch.setattr(Lane, "repeat", counted)
    desk = Desk()
    protocol = connected(desk)
    for read in reads:
        protocol.data_received(read)
    assert desk.asked == sent
    if way == "whole":
        names = [name for _, name, _ in sent]
        repeats = sum(a == b for a, b in pairwise(names))
        assert recognised == repeats or names.count(b"b") > MISSES // 2
    if way == "together":
        assert recognised == 0


async def test_the_end_of_a_body_is_never_remembered_as_a_head() -> None:
    """Whatever a body says, a later request with those bytes is parsed, and keeps its route."""
    desk = Desk()
    protocol = connected(desk)
    second = HEAD % (2, b"b") + b"{}"
    other = HEAD.replace(b"chat/completions", b"embeddings")
    ending = other % (len(second), b"z")
    first = HEAD % (1 + len(ending), b"a") + b"x" + ending
    protocol.data_received(first[: -len(ending)])
    protocol.data_received(ending + second)
    protocol.data_received(other % (3, b"z") + b"abc")
    assert desk.asked == [
        ("/v1/chat/completions", b"a", b"x" + ending),
        ("/v1/chat/completions", b"b", b"{}"),
        ("/v1/embeddings", b"z", b"abc"),
    ]


ODD_PARTS = (
    *(b"content-length: 5", b"Content-Length:0", b"content-length:\t5 ", b"content-length: 40"),
    *(b"x: y", b"x:", b"hello", b"transfer-encoding: chunked", b"transfer-encoding: identity"),
    *(b"connection: close", b"connection: keep-alive", b"expect: 100-continue"),
    *(b"POST /v1/chat/completions HTTP/1.1", b"5\r\nhello\r\n0\r\n", b" content-length: 5", b""),
)
BREAKS = (b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b" \r\n", b"\x00\r\n")


def odd_message(source: random.Random) -> bytes:
    """Make what may be a request, two of them, part of one, or none."""
    lines = [source.choice(ODD_PARTS) + source.choice(BREAKS) for _ in range(source.randrange(6))]
    head = b"POST /v1/chat/completions HTTP/1.1\r\n" + b"".join(lines)
    return head + source.choice((b"", b"content-length: 5\r\n\r\nhello", b"\r\nhello", b"\r\n"))


async def test_what_is_remembered_is_what_the_parser_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However odd a head, whole reads are understood as the parser alone understands the bytes.

    So while a head is remembered the parser is at the end of a request, and may be passed by.
    """
    source = random.Random(1)
    recognised = 0
    usual = Lane.repeat

    def counted(*given: Any) -> DirectCycle | None:  # noqa: ANN401 - as it is given
        nonlocal recognised
        recognised += 1
        return usual(*given)

    monkeypatch.setattr(Lane, "repeat", counted)
    for _ in range(600):
        message = odd_message(source)
        reading, parsing = Desk(), Desk()
        whole, by_bytes = connected(reading), connected(parsing)
        for _ in range(3):
            for protocol, parts in ((whole, [message]), (by_bytes, [*map(bytes, zip(message))])):
                for part in parts:
                    if not protocol.transport.is_closing():  # else nobody would read it
                        protocol.data_received(part)
        assert reading.asked == parsing.asked, message
        assert whole.transport.is_closing() == by_bytes.transport.is_closing(), message
    assert recognised > 50


async def test_heads_that_always_differ_are_not_compared_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After some misses nothing is remembered any more, and all is answered as before."""
    remembered: list[bytes] = []

    def counted(head: bytes) -> FamiliarHead | None:
        remembered.append(head)
        return familiar(head)

    monkeypatch.setattr(protocols, "familiar", counted)
    desk = Desk()
    protocol = connected(desk)
    for number in range(2 * MISSES):
        protocol.data_received(HEAD % (2, b"%d" % number) + b"{}")
    protocol.data_received(HEAD % (2, b"x") + b"{}")
    protocol.data_received(HEAD % (2, b"x") + b"{}")
    assert len(desk.asked) == 2 * MISSES + 2
    assert len(remembered) == MISSES


class Pool:
    """Owns one connection."""

    def __init__(self) -> None:
        self.familiar = Familiar()
        self.idled = 0

    def idle(self, connection: Connection) -> None:
        """Count."""
        assert connection.usable
        self.idled += 1

    def gone(self, connection: Connection) -> None:
        """Ignore it."""


class Listener:
    """Keeps an answer."""

    def __init__(self, *, chunks: bool) -> None:
        self.head: Head | None = None
        self.body = b""
        self.complete = False
        self.lost = ""
        self.chunks = chunks

    def answer_started(self, head: Head) -> bool:
        """Keep the head."""
        assert self.head is None
        self.head = head
        return self.chunks and head.in_chunks

    def answer_data(self, data: bytes, *, complete: bool) -> None:
        """Keep the body."""
        assert self.head is not None
        assert not self.complete
        self.body += data
        self.complete = complete

    def answer_lost(self, reason: str, *, stale: bool) -> None:
        """Keep the reason."""
        del stale
        self.lost = reason


DATE = b"date: Fri, 27 Nov 2026 09:00:0%d GMT\r\n"
WHOLE = (
    b"HTTP/1.1 200 OK\r\n" + DATE + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
)
STREAM = (
    b"HTTP/1.1 200 OK\r\n" + DATE + b"content-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def some_answer(source: random.Random) -> tuple[bytes, int, bytes, bytes]:
    """Make an answer: its bytes, status, body, and its body as chunks if it comes so."""
    second = source.choice((1, 1, 1, 2))
    body = source.choice((b"{}", b'{"a":1}', b"y" * 500, WHOLE % (1, 2) + b"{}", STREAM % 1))
    kind = source.choice(("whole", "whole", "stream", "stream", "error", "bare", "interim"))
    if kind in {"whole", "interim"}:
        interim = b"HTTP/1.1 102 Processing\r\n\r\n" if kind == "interim" else b""
        return interim + WHOLE % (second, len(body)) + body, 200, body, body
    if kind == "error":
        head = WHOLE.replace(b"200 OK", b"429 Too Many Requests")
        return head % (second, len(body)) + body, 429, body, body
    if kind == "bare":
        return b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", b""
    pieces = [body[:3], body[3:]] if source.random() < 0.5 and len(body) > 3 else [body]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    return STREAM % second + chunks, 200, body, chunks


@pytest.mark.parametrize("seed", range(150))
async def test_answers_are_what_the_replica_sent(seed: int) -> None:
    """However answers are cut into reads, and whatever is in them, each is seen as it was sent."""
    source = random.Random(seed)
    pool = Pool()
    connections = [Connection(pool), Connection(pool)]
    for connection in connections:
        connection.connection_made(cast("Any", Transport()))
    for number in range(1, 25):
        connection = source.choice(connections)
        message, status, body, chunks = some_answer(source)
        listener = Listener(chunks=source.random() < 0.5)
        connection.send(listener, b"request")
        for read in cut(message, source) if source.random() < 0.3 else [message]:
            connection.data_received(read)
        assert listener.head is not None
        assert (listener.head.status, listener.complete, listener.lost) == (status, True, "")
        as_chunks = listener.head.in_chunks and listener.chunks
        assert listener.body == (chunks if as_chunks else body)
        assert pool.idled == number


def no_parser(_connection: Connection) -> None:
    """Stand where a parser is made."""


@pytest.mark.parametrize("message", [WHOLE % (1, 2) + b"{}", STREAM % 1 + b"2\r\nab\r\n0\r\n\r\n"])
async def test_a_familiar_answer_is_not_parsed(
    message: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second answer with a head, on any connection to the replica, goes past the parser."""
    pool = Pool()
    for _ in range(3):
        connection = Connection(pool)
        connection.connection_made(cast("Any", Transport()))
        monkeypatch.setattr(httptools, "HttpResponseParser", no_parser)
        listener = Listener(chunks=True)
        connection.send(listener, b"request")
        connection.data_received(message)
        assert listener.complete


async def test_a_familiar_head_that_comes_twice_is_an_answer_too_many() -> None:
    """What nobody asked for is no answer, familiar or not."""
    pool = Pool()
    connection = Connection(pool)
    transport = Transport()
    connection.connection_made(cast("Any", transport))
    for message in (WHOLE % (1, 2) + b"{}",) * 2:
        listener = Listener(chunks=False)
        connection.send(listener, b"request")
        connection.data_received(message)
        assert listener.body == b"{}"
    connection.data_received(WHOLE % (1, 2) + b"{}")
    assert transport.closing


async def test_a_stream_with_a_familiar_head_that_breaks_off_is_lost() -> None:
    """Its connection's end is no end of it."""
    pool = Pool()
    connection = Connection(pool)
    connection.connection_made(cast("Any", Transport()))
    for last in (b"0\r\n\r\n", b""):
        listener = Listener(chunks=True)
        connection.send(listener, b"request")
        connection.data_received(STREAM % 1 + b"2\r\nab\r\n" + last)
    assert (listener.body, listener.complete) == (b"2\r\nab\r\n", False)
    connection.connection_lost(None)
    assert listener.lost
