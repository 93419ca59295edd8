"""Clients that speak HTTP oddly: nothing of theirs stays, and nothing grows without a bound."""

import asyncio
import contextlib
import json

import pytest

from tests.support.waiting import wait_until
from tests.unit.proxy.engine import Engine, Exchanged
from tests.unit.proxy.rig import Rig, chat

PATIENCE_S = 5.0
PIECE = b"y" * 65536


async def test_header_without_an_end() -> None:
    """A header that never ends is cut off by its size, long before its deadline."""
    async with Rig() as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(b"POST / HTTP/1.1\r\nx: ")
        sent_bytes = 0
        with contextlib.suppress(ConnectionError):
            while sent_bytes < 16 << 20:
                writer.write(PIECE)
                await writer.drain()
                sent_bytes += len(PIECE)
        assert sent_bytes < 16 << 20
        with contextlib.suppress(ConnectionError):
            assert b" 431 " in await asyncio.wait_for(reader.read(100), PATIENCE_S)
        writer.close()


async def test_rest_of_a_refused_body() -> None:
    """The body that still comes after a refusal does not keep its connection for ever."""
    async with Rig(client_keep_alive_s=1) as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(
            b"POST /v1/chat/zzz HTTP/1.1\r\nhost: x\r\ncontent-type: text/plain\r\n"
            b"content-length: 9\r\n\r\n"
        )
        await reader.readuntil(b"model_not_found")
        writer.write(b"x")
        await wait_until(lambda: not rig.server.server_state.connections)
        writer.close()


async def test_client_of_two_requests_leaves() -> None:
    """A client that sent another request behind a stream, and leaves, ends the stream."""
    enough = asyncio.Event()

    async def endless(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        while not exchanged.writer.is_closing() and not enough.is_set():
            await exchanged.text("Hello")
            await asyncio.sleep(0)

    async with Engine(endless) as engine, Rig(engine) as rig:
        body = json.dumps(chat(stream=True)).encode()
        reader, writer = await rig.raw(body)
        await reader.readuntil(b"Hello")
        connection = next(iter(rig.server.server_state.connections))
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
        )
        await wait_until(lambda: getattr(connection, "pipeline", None))
        writer.transport.abort()
        await wait_until(rig.idle)
        enough.set()
        assert len(engine.seen) == 1


@pytest.mark.parametrize("pieces", [1, 2, 40])
async def test_client_that_offers_http2(pieces: int) -> None:
    """A client that would rather speak HTTP/2 gets HTTP/1.1, with its body and its next request."""
    body = json.dumps(chat(filler="x" * 1000)).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings\r\n"
        b"upgrade: h2c\r\nhttp2-settings: AAAA\r\ncontent-type: application/json\r\n"
    )
    plain = b"content-length: %d\r\n\r\n%s" % (len(body), body)
    chunked = b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    async with Engine() as engine, Rig(engine) as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        for number, request in enumerate((head + plain, head + chunked, head + plain), start=1):
            size = len(request) // pieces + 1
            for at in range(0, len(request), size):
                writer.write(request[at : at + size])
                await writer.drain()
                await asyncio.sleep(0)
            answer = await asyncio.wait_for(reader.readuntil(b'"completion_tokens": 2}}'), 5)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert [one.body for one in engine.seen] == [body] * number
        writer.close()
        await wait_until(rig.idle)


async def test_many_offers_at_once() -> None:
    """However many requests in one read offer another protocol, each is answered."""
    request = b"GET /nowhere HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"
    async with Rig() as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(request * 400)
        for _ in range(400):
            await asyncio.wait_for(reader.readuntil(b"route_not_found"), PATIENCE_S)
        writer.close()


async def test_offer_with_a_body_that_nobody_can_frame(caplog: pytest.LogCaptureFixture) -> None:
    """An offer of another protocol hides nothing from the parser: its body's framing is refused."""
    async with Rig() as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(
            b"POST /nowhere HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: x\r\n"
            b"transfer-encoding: identity\r\n\r\n"
        )
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"this is not an HTTP/1.1 request" in answer
        writer.close()
        await wait_until(rig.idle)
    assert not [record for record in caplog.records if record.exc_info]
