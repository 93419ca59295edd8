"""HTTP below the client library: slow readers, pipelining, old versions, idle connections."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable

import pytest

from tests.support.waiting import wait_until
from tests.unit.simengine.driving import Started, read_stream

Start = Callable[..., Awaitable[Started]]


def post(body: dict[str, object], version: str = "1.1", extra: str = "") -> bytes:
    """Write a completion request by hand."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/{version}\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n{extra}\r\n"
    )
    return head.encode() + content


async def connect(engine: Started) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection to an engine."""
    return await asyncio.open_connection("127.0.0.1", engine.simulator.server.port)


async def test_a_slow_client_gets_every_token_in_fewer_chunks(start: Start) -> None:
    """While the client does not read, tokens gather; none is lost or comes twice."""
    engine = await start("--step-ms", "0", send_buffer_bytes=4096)
    ask: dict[str, object] = {
        "prompt": "a",
        "max_tokens": 4000,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    whole = await engine.client.post("/v1/completions", json=ask)
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", engine.simulator.server.port))
        await loop.sock_sendall(sock, post(ask))
        await wait_until(lambda: bool(engine.simulator.engine.in_flight), what="it runs")
        await wait_until(lambda: not engine.simulator.engine.in_flight, what="all is generated")
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += await loop.sock_recv(sock, 65536)
    text = data.decode()
    lines = "\n".join(line for line in text.splitlines() if line.startswith("data: "))
    slow, fast = read_stream(lines), read_stream(whole.text)
    assert slow.done
    assert slow.ids == fast.ids
    assert slow.text == fast.text
    assert len(slow.chunks) < len(fast.chunks)


async def test_pipelined_requests_are_answered_in_order(start: Start) -> None:
    """Two requests in one write get their answers one after the other."""
    engine = await start()
    reader, writer = await connect(engine)
    for request_id, tokens in (("first", 30), ("second", 1)):
        writer.write(
            post(
                {"prompt": "a", "max_tokens": tokens, "ignore_eos": True, "request_id": request_id}
            )
        )
    data = b""
    while b"cmpl-second" not in data:
        data += await asyncio.wait_for(reader.read(65536), 5)
    assert data.index(b"cmpl-first") < data.index(b"cmpl-second")
    writer.close()
    await writer.wait_closed()


async def test_an_http_1_0_stream_ends_with_its_connection(start: Start) -> None:
    """Without chunks the end of the body is the end of the connection."""
    engine = await start()
    reader, writer = await connect(engine)
    writer.write(post({"prompt": "a", "max_tokens": 3, "stream": True}, version="1.0"))
    data = await asyncio.wait_for(reader.read(), 5)
    assert b"transfer-encoding" not in data
    assert data.endswith(b"data: [DONE]\n\n")
    writer.close()
    await writer.wait_closed()


async def test_a_client_that_asks_first_is_told_to_go_on(start: Start) -> None:
    """Expect: 100-continue is answered before the body is read."""
    engine = await start()
    reader, writer = await connect(engine)
    head, _, body = post(
        {"prompt": "a", "max_tokens": 1}, extra="expect: 100-continue\r\n"
    ).partition(b"\r\n\r\n")
    writer.write(head + b"\r\n\r\n")
    assert await asyncio.wait_for(reader.readline(), 5) == b"HTTP/1.1 100 Continue\r\n"
    writer.write(body)
    assert await asyncio.wait_for(reader.readline(), 5) == b"\r\n"
    assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 200 ")
    writer.close()
    await writer.wait_closed()


async def test_idle_connections_are_closed_like_uvicorns(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept-alive connection is closed after its time, so a pool must expect that."""
    engine = await start()
    monkeypatch.setattr(engine.simulator.server, "_keep_alive_s", 0.05)
    reader, writer = await connect(engine)
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    data = await asyncio.wait_for(reader.read(), 5)
    assert data.startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()
    await writer.wait_closed()
