"""The end of the public port: nobody who is connected is reset, and nobody is kept waiting."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from litestar.types import Receive

from services.proxy.draining import IDLE_S
from services.proxy.server import Server, bind, make_server
from services.proxy.settings import ProxySettings
from tests.support.waiting import wait_until


async def app(
    scope: Any,  # noqa: ANN401 - litestar's types know no lifespan
    receive: Receive,
    send: Any,  # noqa: ANN401 - as above
) -> None:
    """Answer every request with the path that was asked for."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    message: Any = {"more_body": True}
    while message["more_body"]:
        message = await receive()
    body = scope["path"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class Running:
    """A server in the test's loop."""

    def __init__(self, server: Server, port: int) -> None:
        self.server = server
        self.port = port

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection, and see that the server has taken it."""
        known = len(self.server.server_state.connections)
        opened = await asyncio.open_connection("127.0.0.1", self.port)
        await wait_until(lambda: len(self.server.server_state.connections) > known)
        return opened


@asynccontextmanager
async def running(main_loop: Callable[[int], None] | None = None) -> AsyncGenerator[Running]:
    """Run a server; with `main_loop`, call that with the port and end without another turn."""
    listening = bind("127.0.0.1", 0)
    port: int = listening.getsockname()[1]
    server = make_server(cast("Any", app), ProxySettings(port=0))
    if main_loop is not None:

        async def at_once() -> None:
            main_loop(port)

        server.main_loop = at_once
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    await wait_until(lambda: server.started)
    try:
        yield Running(server, port)
    finally:
        server.should_exit = True
        await asyncio.wait_for(serving, 10)


def request(path: str = "/x", body: bytes = b"{}", *fields: str) -> bytes:
    """Make a POST request."""
    lines = (f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}", *fields)
    return "\r\n".join((*lines, "", "")).encode() + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Read one answer."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode().split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    if "content-length" in fields:
        return int(head[0][9:12]), fields, await reader.readexactly(int(fields["content-length"]))
    size = int(await reader.readline(), 16)
    body = await reader.readexactly(size)
    await reader.readuntil(b"0\r\n\r\n")
    return int(head[0][9:12]), fields, body


async def test_connections_that_were_not_accepted_yet_are_served() -> None:
    """Who connected just before the port closed is answered, although nobody had accepted it."""
    clients: list[socket.socket] = []

    def connect(port: int) -> None:
        for _ in range(3):
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(request("/late"))
            clients.append(client)

    async with running(connect) as one:
        for client in clients:
            client.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=client)
            assert (await answer(reader))[::2] == (200, b"/late")
            writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", one.port)


async def test_leaving_is_said_with_every_answer() -> None:
    """Once the server leaves, an answer says `connection: close`, and the connection ends."""
    async with running() as one:
        reader, writer = await one.connect()
        writer.write(request())
        assert "connection" not in (await answer(reader))[1]
        one.server.leave()
        writer.write(request())
        status, fields, _ = await answer(reader)
        assert (status, fields["connection"]) == (200, "close")
        assert await reader.read() == b""
        writer.close()


async def test_who_is_connected_may_ask_once_more() -> None:
    """After listening has ended, a request on an open connection is still served."""
    async with running() as one:
        reader, writer = await one.connect()
        one.server.leave()
        one.server.should_exit = True
        await wait_until(lambda: one.server.ending.unheard_s is not None)
        writer.write(request("/again"))
        status, fields, body = await answer(reader)
        assert (status, fields["connection"], body) == (200, "close", b"/again")
        writer.close()


async def test_idle_connections_end_in_order() -> None:
    """An idle connection is half-closed after a moment; what crosses that is not reset."""
    async with running() as one:
        reader, writer = await one.connect()
        began_s = asyncio.get_running_loop().time()
        one.server.should_exit = True
        assert await asyncio.wait_for(reader.read(), 5) == b""
        assert asyncio.get_running_loop().time() - began_s >= IDLE_S
        writer.write(request())
        await writer.drain()
        writer.write_eof()
        await wait_until(lambda: not one.server.server_state.connections)
        writer.close()
        await writer.wait_closed()  # raises if the connection was reset


async def test_a_client_that_stays_is_left() -> None:
    """A client that does not close a half-closed connection holds up the end by a second only."""
    async with running() as one:
        _, writer = await one.connect()
        one.server.should_exit = True
        await wait_until(lambda: not one.server.server_state.connections, timeout_s=5)
        writer.close()


@pytest.mark.parametrize(
    ("path", "kind"), [("/v1/chat/completions", "error"), ("/v1/messages", "type")]
)
async def test_late_requests_are_refused_politely(path: str, kind: str) -> None:
    """Near the end a request gets 503 in its API's shape, with its id and when to come again."""
    async with running() as one:
        reader, writer = await one.connect()
        one.server.leave()
        one.server.refuse()
        writer.write(request(path, b"x" * 500_000, "x-request-id: mine"))
        status, fields, body = await answer(reader)
        assert status == 503
        assert (fields["retry-after"], fields["connection"]) == ("1", "close")
        assert fields["x-request-id"] == "mine"
        assert kind in json.loads(body)
        assert one.server.ending.refused == 1
        writer.close()


async def test_who_merely_looks_is_answered_to_the_end() -> None:
    """Health and metrics, which are GETs, are answered while requests are refused."""
    async with running() as one:
        reader, writer = await one.connect()
        one.server.refuse()
        writer.write(b"GET /health/ready HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await answer(reader))[::2] == (200, b"/health/ready")
        writer.close()
