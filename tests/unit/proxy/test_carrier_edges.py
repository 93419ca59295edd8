"""What a carrier is told once must not be missed, and the end of a stream is carried as well."""

import asyncio
import contextlib
import socket

import pytest

from services.proxy.carrier.carrying import Carrier
from tests.support.waiting import wait_until
from tests.unit.proxy.test_carrier import Stream, enter, plain

END = b"0\r\n\r\n"


@pytest.mark.parametrize("slow", [False, True])
async def test_the_end_of_a_stream_is_carried_too(carrier: Carrier, *, slow: bool) -> None:
    """Nothing of it is left but to go on; also where the client had no room for it."""
    stream = Stream(None)
    filled = b""
    if slow:
        with contextlib.suppress(BlockingIOError):
            while True:
                filled += b"." * stream.down.send(b"." * 100)
    await enter(carrier, stream)
    stream.replica.sendall(plain("x") + END)
    await wait_until(lambda: not stream.lent, what="it has ended")
    stream.take_output()
    assert stream.out == filled + plain("x") + END
    assert stream.backs == ([b"slow", b"whole"] if slow else [b"whole"])
    assert (stream.events, stream.chunks.ended, carrier.streams) == (1, True, 0)
    stream.close()


@pytest.mark.parametrize(
    "data", [END + b"x", END + END, END[:-1], b"00\r\n\r\n", b"0\r\na: b\r\n\r\n"]
)
async def test_an_end_that_is_not_a_plain_one_is_given_back(carrier: Carrier, data: bytes) -> None:
    """With trailers, in parts, or with something after it."""
    stream = Stream(None)
    stream.relay = len  # type: ignore[assignment, method-assign] - what is given back counts
    await enter(carrier, stream)
    stream.replica.sendall(plain("x") + data)
    await wait_until(lambda: not stream.lent, what="it is given back")
    assert (stream.backs, stream.events) == ([plain("x") + data], 0)
    stream.close()


async def test_what_came_before_the_carrier_looks_is_carried(carrier: Carrier) -> None:
    """Tokens that wait when a stream is lent, and their end: an edge tells of them once."""
    stream = Stream(None)
    stream.replica.sendall(plain("x"))
    stream.replica.close()
    await enter(carrier, stream)
    await wait_until(lambda: not carrier.streams, what="its end is seen")
    stream.take_output()
    assert (stream.out, stream.events, stream.backs) == (plain("x"), 1, [b""])
    stream.close()


async def test_a_read_that_fills_the_buffer_is_given_back(carrier: Carrier) -> None:
    """An edge tells once of what is behind it; whoever reads on does not depend on edges."""
    stream = Stream(None)
    stream.relay = len  # type: ignore[assignment, method-assign] - what is given back counts
    stream.replica.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    text = "x" * ((1 << 16) - len(plain("")) - len("ff"))  # its size has two digits more
    stream.replica.sendall(plain(text) + plain("y"))
    await enter(carrier, stream)
    await wait_until(lambda: not stream.lent, what="it is given back")
    assert (stream.backs, stream.events) == ([plain(text)], 0)
    assert stream.up.recv(1 << 20) == plain("y")
    stream.close()


async def test_tokens_are_acknowledged_lazily(carrier: Carrier) -> None:
    """The kernel takes the replica's connection for an interactive one."""
    stream = Stream(None)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        replica = socket.create_connection(listening.getsockname())
        up, _ = listening.accept()
    up.setblocking(False)
    assert up.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK)
    stream.lent_fd = up.fileno()
    await enter(carrier, stream)
    assert not up.getsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK)
    replica.sendall(plain("x"))
    await wait_until(lambda: _waiting(stream.client) > 0, what="it is carried")
    carrier.close()
    for each in (replica, up, stream):
        each.close()


def _waiting(receiver: socket.socket) -> int:
    """Count the bytes that wait to be read."""
    with contextlib.suppress(BlockingIOError):
        return len(receiver.recv(1 << 16, socket.MSG_PEEK))
    return 0


async def test_a_fault_in_handling_one_stream_is_no_other_ones(carrier: Carrier) -> None:
    """What else came with it is carried, as its edge is not told again; the stream is given up."""
    faulty, other = Stream(None), Stream(None)
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))

    def fail(data: bytes) -> None:
        raise ZeroDivisionError(data)

    faulty.relay = fail  # type: ignore[method-assign] - stands for any fault of ours
    for stream, data in ((faulty, b"x"), (other, plain("x"))):
        await enter(carrier, stream)
        stream.replica.sendall(data)
    await wait_until(lambda: _waiting(other.client) > 0, what="it is carried")
    assert (len(faults), carrier.streams) == (1, 1)
    assert (faulty.given_up, other.given_up) == (True, False)
    carrier.close()
    for stream in (faulty, other):
        stream.close()
