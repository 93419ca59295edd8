"""Answers that go well, and clients that leave or are slow."""

import asyncio
import json

from shared.models.deployment import StreamFailover
from shared.secret import Secret, replica_api_key
from tests.support.waiting import wait_until
from tests.unit.proxy.engine import Engine, Exchanged
from tests.unit.proxy.rig import Rig, chat

UNARMED = {"stream_failover": StreamFailover.OFF}


async def test_unary() -> None:
    """A plain answer arrives whole, and nothing stays reserved."""
    async with Engine() as engine, Rig(engine) as rig:
        answer = await rig.chat()
        assert answer.status_code == 200
        assert answer.json()["object"] == "chat.completion"
        assert answer.headers["content-length"] == str(len(answer.content))
        await wait_until(rig.idle)


async def test_stream() -> None:
    """A stream arrives byte for byte as the replica sent it."""
    async with Engine() as engine, Rig(engine) as rig:
        answer = await rig.chat(stream=True)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.text.endswith("data: [DONE]\n\n")
        assert answer.text.count("\n\n") == 4
        await wait_until(rig.idle)


async def test_every_field_passes() -> None:
    """The body reaches the replica unchanged, with our key and not the client's."""
    body = b'{"model" : "org/Demo-1B", "messages":[], "x_unknown": [1, 2.50], "seed":7}'
    async with Engine() as engine, Rig(engine) as rig:
        await rig.http.post(
            "/v1/chat/completions",
            content=body,
            headers={
                "content-type": "application/json; charset=utf-8",
                "authorization": "Bearer of-the-client",
                "x-request-id": "my-id-1",
            },
        )
        seen = engine.seen[0]
        assert seen.body == body
        key = replica_api_key(Secret("fleet"), "demo-0", 1)
        assert seen.headers["authorization"] == f"Bearer {key}"
        assert seen.headers["x-request-id"] == "my-id-1"


async def test_request_id() -> None:
    """A sane request id is echoed; anything else is replaced by one of ours."""
    async with Engine() as engine, Rig(engine) as rig:
        path = "/v1/chat/completions"
        good = await rig.http.post(path, json=chat(), headers={"x-request-id": "a.b-1"})
        assert good.headers["x-request-id"] == "a.b-1"
        bad = await rig.http.post(path, json=chat(), headers={"x-request-id": "a b" * 99})
        assert len(bad.headers["x-request-id"]) == 32


async def test_connections_are_reused() -> None:
    """Requests one after another use one connection to the replica."""
    async with Engine() as engine, Rig(engine) as rig:
        for _ in range(5):
            await rig.chat()
            await rig.chat(stream=True)
        assert engine.connections == 1
        assert len(engine.seen) == 10


async def test_disconnect_aborts_stream() -> None:
    """A client that leaves in the middle of a stream aborts it at the replica, and releases."""

    async def endless(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        await exchanged.text("Hello")
        await exchanged.abandoned()

    async with Engine(endless) as engine, Rig(engine) as rig:
        reader, writer = await rig.raw(json.dumps(chat(stream=True)).encode())
        await reader.readuntil(b"Hello")
        assert len(rig.ledger.held) == 1
        writer.close()
        await wait_until(lambda: engine.aborted == 1)
        await wait_until(rig.idle)


async def test_disconnect_aborts_unary() -> None:
    """A client that leaves before a plain answer aborts it at the replica, and releases."""

    async def silent(exchanged: Exchanged) -> None:
        await exchanged.abandoned()

    async with Engine(silent) as engine, Rig(engine) as rig:
        _reader, writer = await rig.raw(json.dumps(chat()).encode())
        await wait_until(lambda: engine.seen)
        writer.close()
        await wait_until(lambda: engine.aborted == 1)
        await wait_until(rig.idle)


async def test_slow_client_pauses_replica() -> None:
    """A client that does not read pauses the replica: little is buffered, nothing lost."""
    sent = 0
    total = 64 << 20
    piece = b"data: " + b"x" * 65530 + b"\n\n"

    async def flood(exchanged: Exchanged) -> None:
        nonlocal sent
        await exchanged.begin_stream()
        while sent < total:
            await exchanged.chunk(piece)
            sent += len(piece)
        await exchanged.end_stream()

    async with Engine(flood) as engine, Rig(engine, spec=UNARMED) as rig:
        reader, writer = await rig.raw(json.dumps(chat(stream=True)).encode())
        await reader.readuntil(b"\r\n\r\n")
        before = -1

        def stands_still() -> bool:
            nonlocal before
            still = sent == before
            before = sent
            return still

        await wait_until(stands_still, interval_s=0.2)
        assert 0 < sent < total / 2
        got = 0
        last = b""
        while not last.endswith(b"0\r\n\r\n"):
            data = await reader.read(1 << 20)
            assert data
            got += len(data)
            last = (last + data)[-16:]
        assert got >= total
        writer.close()
        await wait_until(rig.idle)


async def test_stalled_client_is_disconnected() -> None:
    """A client that takes nothing for too long is disconnected, and its answer aborted."""

    async def flood(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        while not exchanged.writer.is_closing():
            await exchanged.chunk(b"data: " + b"x" * 65530 + b"\n\n")

    async with Engine(flood) as engine, Rig(engine, client_stall_timeout_s=0.3) as rig:
        reader, writer = await rig.raw(json.dumps(chat(stream=True)).encode())
        await reader.readuntil(b"\r\n\r\n")
        await wait_until(rig.idle)
        writer.close()


async def test_cost_is_settled_at_the_first_token() -> None:
    """The prompt's share of a cost is given back with the first token, the rest at the end."""
    go = asyncio.Event()

    async def paced(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        await exchanged.text("a")
        await go.wait()
        await exchanged.text("b", "stop")
        await exchanged.end_stream()

    async with Engine(paced) as engine, Rig(engine) as rig:
        body = chat(stream=True, max_tokens=10)
        body["messages"][0]["content"] = "x" * 4000
        reader, writer = await rig.raw(json.dumps(body).encode())
        await reader.readuntil(b'"a"')
        await wait_until(lambda: [one.cost_tokens for one in rig.ledger.held.values()] == [10])
        assert rig.ledger.reserves()[0].cost_tokens > 1000
        go.set()
        await wait_until(rig.idle)
        writer.close()


async def test_large_plain_answer() -> None:
    """A plain answer larger than the buffer is passed on as it comes, complete."""
    body = b"[" + b"1," * (6 << 20) + b"1]"

    async def large(exchanged: Exchanged) -> None:
        await exchanged.whole(200, body)

    async with Engine(large) as engine, Rig(engine) as rig:
        answer = await rig.chat()
        assert answer.content == body
        await wait_until(rig.idle)


async def test_answer_until_close() -> None:
    """An answer that ends with its connection is whole if its JSON is."""

    async def old(exchanged: Exchanged) -> None:
        await exchanged.head(200, "application/json", "connection: close")
        exchanged.writer.write(b'{"ok": true}')
        await exchanged.writer.drain()
        exchanged.writer.close()

    async with Engine(old) as engine, Rig(engine, spec=UNARMED) as rig:
        answer = await rig.chat()
        assert answer.json() == {"ok": True}
        await wait_until(rig.idle)


async def test_large_answer_until_close_that_is_cut() -> None:
    """A large answer that ends with its connection, in the middle, is no success."""

    async def cut(exchanged: Exchanged) -> None:
        await exchanged.head(200, "application/json", "connection: close")
        exchanged.writer.write(b"[" + b"1," * (5 << 20))
        await exchanged.writer.drain()
        exchanged.writer.close()

    async with Engine(cut) as engine, Rig(engine, max_tries=1) as rig:
        answer = await rig.chat()
        assert answer.status_code == 502
        await wait_until(rig.idle)


async def test_stream_until_close_whose_end_is_split() -> None:
    """A stream that ends with its connection is whole with its [DONE], however it is cut."""
    go = asyncio.Event()

    async def old(exchanged: Exchanged) -> None:
        await exchanged.head(200, "text/event-stream", "connection: close")
        exchanged.writer.write(b'data: {"choices":[]}\n\ndata: [DO')
        await exchanged.writer.drain()
        await go.wait()
        exchanged.writer.write(b"NE]\n\n")
        await exchanged.writer.drain()
        exchanged.writer.close()

    async with Engine(old) as engine, Rig(engine, spec=UNARMED) as rig:
        reader, writer = await rig.raw(json.dumps(chat(stream=True)).encode())
        await reader.readuntil(b"[DO")
        go.set()
        rest = await reader.readuntil(b"0\r\n\r\n")
        assert b"stream_broken" not in rest
        writer.close()
