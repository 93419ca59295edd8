"""Streams are carried in compiled code as Python relays them, and given back for the rest."""

import asyncio
import contextlib
import os
import random
import shutil
import socket
from pathlib import Path
from typing import Final

import pytest

from services.proxy.carrier import carrying, compiled
from services.proxy.carrier.carrying import MAX_OFFERS, PASSED_ON, Carried, Carrier, Told
from services.proxy.continuation.tape import Options, Tape
from services.proxy.framing import Chunks
from tests.support.waiting import wait_until

HEAD: Final = '{"id":"chatcmpl-%d","object":"chat.completion.chunk","created":1,"model":"m",'
TEXTS: Final = (
    "a",
    " the",
    "é",
    "東京",
    "🎈",
    "\\n",
    '\\"',
    "\\u00e9",
    "x" * 300,
    "a}]}",
    "[1]",
    "",
)
IDS: Final = (
    *("[1]", "[0]", "[31999]", "[999999999]", "[4294967295]", "[4294967296]", "[-1]"),
    *("[7,8]", "[7,4294967296,8]", "[]", "null", "[ 5]"),
)


class Stream:
    """Both ends of a carried stream: its source and its target, with a reference for the rest."""

    def __init__(self, tape: Tape | None) -> None:
        self.tape = tape
        self.offers = 0
        self.carried_by: Carried | None = None
        self.replica, self.up = socket.socketpair()
        self.down, self.client = socket.socketpair()
        for each in (self.replica, self.up, self.down, self.client):
            each.setblocking(False)
        self.chunks = Chunks(framed=tape is None)
        self.out = b""
        self.events = 0
        self.backs: list[bytes] = []
        self.lent = False
        self.lent_fd = self.up.fileno()
        self.paused = 0
        self.given_up = False
        self.listener = object()
        self.writable = True
        self.source = _Source(self)

    def close(self) -> None:
        """Close all sockets."""
        for each in (self.replica, self.up, self.down, self.client):
            each.close()

    def relay(self, data: bytes) -> None:
        """Do in Python what is done with a read."""
        body = self.chunks.take(data)
        if self.tape is None:
            self.out += body
            self.events += body.count(b"\n\n")
        elif body and (events := self.tape.feed(body)):
            self.out += b"%x\r\n%b\r\n" % (len(events), events)

    def take_output(self) -> None:
        """Read what was carried to the client."""
        with contextlib.suppress(OSError):  # nothing is there, or the client has left
            while got := self.client.recv(1 << 20):
                self.out += got

    # carrying.Target

    @property
    def shape(self) -> tuple[bytes, bytes] | None:
        """As a relay says."""
        return PASSED_ON if self.tape is None else self.tape.shape

    def lend(self) -> int:
        """Lend the client's socket."""
        return self.down.fileno() if self.writable else -1

    def carried(self, told: Told) -> None:
        """Note what was carried."""
        self.events += told.events
        if self.tape is not None:
            self.tape.carried(told.ids, told.chars)

    def write_rest(self, rest: bytes) -> bool:
        """Write with patience, as a transport would later."""
        self.backs.append(b"slow")
        self.take_output()
        self.out += rest
        return False


class _Source:
    """The replica's side of a stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.carried: Carried | None = None

    def lend(self, listener: object) -> int:
        """Lend the replica's socket, between chunks."""
        stream = self._stream
        if listener is not stream.listener or not stream.chunks.between:
            return -1
        stream.lent = True
        return stream.lent_fd

    def take_back(self, data: bytes) -> None:
        """Take it back, and relay what was read."""
        stream = self._stream
        stream.lent = False
        stream.backs.append(data)
        if data:
            stream.take_output()  # what was carried came before
            stream.relay(data)

    def pause(self) -> None:
        """Note it."""
        self._stream.paused += 1

    def carried_whole(self) -> None:
        """Note that there is no more to come."""
        stream = self._stream
        stream.lent = False
        stream.backs.append(b"whole")
        stream.chunks.ended = True

    def give_up(self) -> None:
        """Note that the replica is to be left."""
        self._stream.given_up = True


def event(source: random.Random, number: int) -> bytes:
    """Make an event: usual ones mostly, and each kind of unusual one."""
    text, ids = source.choice(TEXTS), source.choice(IDS)
    kind = source.random()
    if kind < 0.7:
        text, ids = source.choice(TEXTS[:5]), f"[{source.randrange(150_000)}]"
    end = '"finish_reason":null'
    if 0.7 <= kind < 0.73:
        end = '"finish_reason":"stop"'
    payload = (
        HEAD % number + f'"choices":[{{"index":0,"delta":{{"content":"{text}"}},"logprobs":null,'
        f'{end},"token_ids":{ids}}}]}}'
    ).encode()
    if 0.73 <= kind < 0.75:
        payload = payload.replace(b"created", b"Created")
    elif 0.75 <= kind < 0.77:
        payload = payload.replace(b'content":"', b'content":"\xff')
    elif 0.77 <= kind < 0.79:
        return b": a comment\n\n"
    elif 0.79 <= kind < 0.81:
        payload = b'{"id":"x","choices":[],"usage":{"completion_tokens":3}}'
    elif 0.81 <= kind < 0.83:
        payload = payload[:-1] + b" }"
    return b"data: " + payload + b"\n\n"


def chunk(source: random.Random, body: bytes) -> bytes:
    """Frame a body; sizes are written in every way that is allowed."""
    size = b"%x" % len(body)
    way = source.random()
    if way < 0.05:
        size = size.upper()
    elif way < 0.08:
        size = b"000" + size
    elif way < 0.10:
        size += b";a=b"
    return size + b"\r\n" + body + b"\r\n"


def reads(source: random.Random) -> list[bytes]:
    """Make the reads of one stream: mostly whole chunks, sometimes several, or parts."""
    first = event(random.Random(3), 1)
    framed = [chunk(random.Random(1), first)]
    events = [event(source, 1) for _ in range(source.randrange(5, 60))]
    while events:
        body = events.pop()
        if events and source.random() < 0.05:
            body += events.pop()
        if source.random() < 0.03 and len(body) > 10:
            cut = source.randrange(1, len(body))
            framed += [chunk(source, body[:cut]), chunk(source, body[cut:])]
        else:
            framed.append(chunk(source, body))
    framed += [chunk(source, b"data: [DONE]\n\n") + b"0\r\n\r\n"]
    grouped: list[bytes] = []
    while framed:
        data = b"".join(
            framed.pop(0) for _ in range(min(len(framed), source.choice((1, 1, 1, 2, 5))))
        )
        if source.random() < 0.05 and len(data) > 2:
            cut = source.randrange(1, len(data))
            grouped += [data[:cut], data[cut:]]
        else:
            grouped.append(data)
    return grouped


def unframed(data: bytes) -> bytes:
    """Take a body out of its chunks."""
    return Chunks(framed=False).take(data) if data else b""


@pytest.mark.parametrize("armed", [False, True])
async def test_carried_streams_are_relayed_as_python_relays_them(
    carrier: Carrier, *, armed: bool
) -> None:
    """For random streams: the same bytes to the client, the same notes on the tape."""
    backs = 0
    for seed in range(400):
        source = random.Random(seed)
        given = reads(source)
        alone, stream = (Stream(Tape(Options()) if armed else None) for _ in range(2))
        for data in given:
            alone.relay(data)
            if stream.lent:
                stream.replica.sendall(data)
                await _carried(stream)
            else:
                stream.relay(data)
            stream.offers = 0
            carrier.offer(stream.source, stream, stream.listener)
            await asyncio.sleep(0)
        if stream.source.carried is not None:
            stream.source.carried.end()
        stream.take_output()
        assert unframed(stream.out) == unframed(alone.out), seed
        if stream.tape is None or alone.tape is None:
            assert stream.events == alone.events, seed
            assert stream.chunks.ended == alone.chunks.ended, seed
        else:
            for name in ("ids", "chars", "finished", "error", "refusal", "usage_told"):
                assert getattr(stream.tape, name) == getattr(alone.tape, name), (seed, name)
            assert stream.tape.cut() == alone.tape.cut(), seed
        backs += len(stream.backs)
        for each in (alone, stream):
            each.close()
    assert carrier.tokens > 2000, "hardly anything was carried: the comparison compared nothing"
    assert backs > 400, "hardly anything was given back"


def plain(text: str, stream: int = 1) -> bytes:
    """Make a chunk with a usual event."""
    data = f'data: {HEAD % stream}"choices":[{{"index":0,"text":"{text}"}}]}}\n\n'.encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


async def enter(carrier: Carrier, stream: Stream) -> None:
    """Have a stream carried."""
    carrier.offer(stream.source, stream, stream.listener)
    await asyncio.sleep(0)
    assert stream.source.carried is not None


@pytest.mark.parametrize(
    "data", [b"3\r\nx\n:\r\n", plain("x")[:-2] + b"xx", b"0\r\nx: y\r\n\r\n", b"x"]
)
async def test_what_is_no_whole_event_is_given_back(carrier: Carrier, data: bytes) -> None:
    """Else a stream that breaks off could not be ended by an event of its own."""
    stream = Stream(None)
    stream.relay = len  # type: ignore[assignment, method-assign] - what is given back counts
    await enter(carrier, stream)
    stream.replica.sendall(data)
    await wait_until(lambda: not stream.lent, what="it is given back")
    assert (stream.backs, stream.events) == ([data], 0)
    stream.take_output()
    assert stream.out == b""
    stream.close()


async def test_a_slow_client_gets_everything_in_order(carrier: Carrier) -> None:
    """When its socket is full the stream is given back, with what did not fit, and paused."""
    stream = Stream(None)
    await enter(carrier, stream)
    sent = b""
    while not stream.backs:
        data = b"".join(plain(str(n)) for n in range(100))
        stream.replica.sendall(data)
        sent += data
        await _carried(stream)
    stream.take_output()
    assert stream.out == sent
    assert (stream.backs, stream.paused, carrier.streams) == ([b"", b"slow"], 1, 0)
    stream.close()


async def _carried(stream: Stream) -> None:
    """Wait until nothing is left to read, or the stream is given back: thousands of times."""
    with contextlib.suppress(BlockingIOError):
        while stream.lent and stream.up.recv(1, socket.MSG_PEEK):  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0)


async def test_the_end_of_either_side_gives_the_stream_back(carrier: Carrier) -> None:
    """A lost replica is left for the connection to find; a lost client for who writes the rest."""
    lost, left = Stream(None), Stream(None)
    for stream in (lost, left):
        await enter(carrier, stream)
    lost.replica.close()
    left.client.close()
    left.replica.sendall(plain("x"))
    await wait_until(lambda: not carrier.streams, what="both are given back")
    assert (lost.backs, lost.up.recv(1)) == ([b""], b"")
    assert left.backs == [b"", b"slow"]
    for stream in (lost, left):
        stream.close()


async def test_streams_come_and_go_without_mixing(carrier: Carrier) -> None:
    """Hundreds of streams in changing places, taken back at any moment: each gets its own."""
    source = random.Random(5)
    streams: dict[int, Stream] = {}
    expected: dict[int, bytes] = {}
    for number in range(2000):
        if len(streams) < 200 and source.random() < 0.3:
            streams[number], expected[number] = Stream(None), b""
            await enter(carrier, streams[number])
        for chosen in source.sample(list(streams), min(5, len(streams))):
            data = plain(f"{chosen} {number}", chosen)
            streams[chosen].replica.sendall(data)
            expected[chosen] += data
        if source.random() < 0.5:
            await asyncio.sleep(0)
        if streams and source.random() < 0.3:
            chosen = source.choice(list(streams))
            stream, due = streams.pop(chosen), expected.pop(chosen)
            assert stream.source.carried is not None
            stream.source.carried.end()
            stream.take_output()
            with contextlib.suppress(BlockingIOError):
                stream.out += stream.up.recv(1 << 20)
            assert stream.out == due
            stream.close()
    assert carrier.streams == len(streams)
    for stream in streams.values():
        assert stream.source.carried is not None
        stream.source.carried.end()
        stream.close()


async def test_what_cannot_be_carried_is_left_alone(carrier: Carrier) -> None:
    """Another listener, a client with something unsent, an unknown shape, too many offers."""
    stream = Stream(None)
    carrier.offer(stream.source, stream, object())
    stream.writable = False
    carrier.offer(stream.source, stream, stream.listener)
    unknown = Stream(Tape(Options()))
    carrier.offer(unknown.source, unknown, unknown.listener)
    await asyncio.sleep(0)
    assert carrier.taken == 0
    stream.writable = True
    stream.offers = MAX_OFFERS
    carrier.offer(stream.source, stream, stream.listener)
    await asyncio.sleep(0)
    assert (carrier.taken, unknown.offers) == (0, 0)
    for each in (stream, unknown):
        each.close()


async def test_who_has_a_descriptor_that_cannot_be_watched_reads_on(carrier: Carrier) -> None:
    """Where the kernel refuses, the source reads again as before."""
    stream = Stream(None)
    stream.lent_fd = os.memfd_create("not a socket")  # epoll refuses files
    carrier.offer(stream.source, stream, stream.listener)
    await asyncio.sleep(0)
    os.close(stream.lent_fd)
    assert (stream.source.carried, stream.backs, carrier.streams) == (None, [b""], 0)
    stream.close()


async def test_heard_is_when_the_last_bytes_came(carrier: Carrier) -> None:
    """Silence is judged by it."""
    loop = asyncio.get_running_loop()
    stream = Stream(None)
    await enter(carrier, stream)
    carried = stream.source.carried
    assert carried is not None
    entered_s = carried.heard_s
    await asyncio.sleep(0.05)
    assert carried.heard_s == entered_s
    stream.replica.sendall(plain("x"))
    await wait_until(lambda: carried.heard_s > entered_s, what="it is heard")
    assert loop.time() - carried.heard_s < 1
    carrier.close()
    assert (stream.backs, stream.events) == ([b""], 1)
    carrier.close()
    carrier.offer(stream.source, stream, stream.listener)
    await asyncio.sleep(0)
    assert stream.source.carried is None
    stream.close()


def test_without_a_compiler_nothing_is_carried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The installation says so and goes on; a source that does not compile says why."""
    copy = tmp_path / "carrier.c"
    shutil.copy(compiled.SOURCE, copy)
    monkeypatch.setattr(compiled, "SOURCE", copy)
    assert compiled.load() is None
    loop = asyncio.new_event_loop()
    assert carrying.make_carrier(loop) is None
    loop.close()
    monkeypatch.setenv("PATH", "")
    assert compiled.main() == 0
    assert "no C compiler (apt-get install gcc" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "SOURCE", copy)
    made = compiled.build()
    assert compiled.load() is not None
    copy.write_text(copy.read_text() + "/* another version */")
    assert compiled.load() is None
    assert compiled.build() != made
    assert [path.name for path in tmp_path.glob("*.so")] == [compiled.library_path().name]
    copy.write_text("int broken(")
    assert compiled.main() == 0
    assert "error" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2
