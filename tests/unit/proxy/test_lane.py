"""The fast lane answers as the application does, and leaves to it what is not usual."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from services.proxy.lane import DirectCycle
from tests.support.waiting import wait_until
from tests.unit.proxy.engine import Engine, Exchanged
from tests.unit.proxy.rig import Rig

PATH = "/v1/chat/completions"
Answer = Callable[[Exchanged], Awaitable[None]]


def request(body: bytes, *fields: str, path: str = PATH) -> bytes:
    """Write a POST as bytes."""
    head = "\r\n".join(
        (
            f"POST {path} HTTP/1.1",
            "host: x",
            "x-request-id: r1",
            f"content-length: {len(body)}",
            *fields,
        )
    )
    return head.encode() + b"\r\n\r\n" + body


def chat(*, stream: bool = False, model: str = "demo", **fields: object) -> bytes:
    """Encode a chat request."""
    messages = [{"role": "user", "content": "Hi"}]
    return json.dumps({"model": model, "messages": messages, "stream": stream, **fields}).encode()


async def whole(exchanged: Exchanged) -> None:
    """Answer at once."""
    await exchanged.whole(200, b'{"choices":[],"usage":{"completion_tokens":3}}')


async def stream(exchanged: Exchanged) -> None:
    """Stream three events, the last two of them in one write with the end."""
    await exchanged.begin_stream()
    await exchanged.text("a")
    await exchanged.text("b\u00e9", "stop")
    await exchanged.end_stream()


async def refused(exchanged: Exchanged) -> None:
    """Refuse as an engine does."""
    await exchanged.whole(400, b'{"error":{"message":"too long"}}')


async def broken(exchanged: Exchanged) -> None:
    """Break off in mid-stream."""
    await exchanged.begin_stream()
    await exchanged.text("a")
    exchanged.reset()


JSON = "content-type: application/json"


@pytest.mark.parametrize(
    ("answer", "asked"),
    [
        (whole, request(chat(), JSON)),
        (whole, request(chat(), JSON, "connection: close")),
        (whole, request(chat(), JSON, path="/v1/embeddings")),
        (stream, request(chat(stream=True), JSON)),
        (stream, request(chat(stream=True, n=2), JSON)),
        (broken, request(chat(stream=True, n=2), JSON)),
        (refused, request(chat(), JSON)),
        (whole, request(b"{", JSON)),
        (whole, request(b"[]", JSON)),
        (whole, request(b"", JSON)),
        (whole, request(chat(), "content-type: text/html")),
        (whole, request(chat(model="none"), JSON)),
        (whole, request(b"{", JSON, path="/v1/messages")),
        (whole, request(chat(filler="x" * 5000), JSON)),
    ],
)
async def test_both_ways_answer_alike(answer: Answer, asked: bytes) -> None:
    """Status, headers, framing and body are the same, byte for byte but for the time."""
    seen: list[tuple[list[bytes], bytes]] = []
    for lane in (True, False):
        async with Engine(answer) as engine:
            rig = Rig(engine, max_body_bytes=4000)
            rig.lane = lane
            async with rig:
                reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
                writer.write(asked)
                head, body = await answered(reader)
                writer.close()
        seen.append((sorted(line for line in head if not line.startswith(b"date:")), body))
    assert seen[0] == seen[1]
    assert seen[0][1]


async def answered(reader: asyncio.StreamReader) -> tuple[list[bytes], bytes]:
    """Read one answer: the lines of its head, and its body out of its chunks."""
    head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[:-2]
    if b"transfer-encoding: chunked" not in head:
        length = next(line for line in head if line.startswith(b"content-length: "))
        return head, await reader.readexactly(int(length.partition(b" ")[2]))
    body = b""
    while chunk := await reader.readexactly(int(await reader.readuntil(b"\r\n"), 16)):
        body += chunk
        await reader.readexactly(2)
    await reader.readexactly(2)
    return head, body


@pytest.mark.parametrize(
    ("asked", "direct"),
    [
        (request(chat(), JSON), True),
        (request(chat(), JSON, "x-redmesh-resumable: 0"), False),
        (request(chat(), JSON, "expect: 100-continue"), False),
        (request(chat(), JSON).replace(b"HTTP/1.1", b"HTTP/1.0"), False),
        (request(chat(), JSON).replace(PATH.encode(), b"/v1/chat/demo"), False),
        (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(chat()), chat()),
            False,
        ),
    ],
)
async def test_what_takes_the_lane(asked: bytes, direct: bool) -> None:  # noqa: FBT001 - a table's column
    """Only requests that need nothing else take the lane; the others are answered all the same."""
    go = asyncio.Event()

    async def late(exchanged: Exchanged) -> None:
        await go.wait()
        await whole(exchanged)

    async with Engine(late) as engine, Rig(engine) as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(asked)
        connections: set[Any] = rig.server.server_state.connections
        await wait_until(lambda: len(rig.ledger.held) == 1)
        assert isinstance(next(iter(connections)).cycle, DirectCycle) is direct
        go.set()
        answer = await reader.readuntil(b'"completion_tokens":3}}')
        assert b" 200 OK\r\n" in answer
        writer.close()


async def test_requests_behind_each_other() -> None:
    """Requests sent at once on one connection are answered in order, whichever way each goes."""
    async with Engine(whole) as engine, Rig(engine) as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        health = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"
        one = request(chat(), JSON)
        writer.write(one + health + one + request(b"{", JSON) + one)
        statuses = [(await answered(reader))[0][0].split()[1] for _ in range(5)]
        assert statuses == [b"200", b"200", b"200", b"400", b"200"]
        writer.close()


async def test_a_fault_of_ours_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the proxy's own code is a 500 of OpenAI's shape, and the connection goes on."""

    def fail(*_args: object, **_fields: object) -> None:
        raise ZeroDivisionError

    async with Engine(whole) as engine, Rig(engine) as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        with monkeypatch.context() as patched:
            patched.setattr("services.proxy.api.hot.inbound", fail)
            writer.write(request(chat(), JSON))
            head, body = await answered(reader)
        assert head[0].startswith(b"HTTP/1.1 500 ")
        assert json.loads(body)["error"]["type"] == "server_error"
        writer.write(request(chat(), JSON))
        head, _ = await answered(reader)
        assert head[0].startswith(b"HTTP/1.1 200 ")
        writer.close()
