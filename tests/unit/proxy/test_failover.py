"""Replicas that fail: repaired before the first byte, told after it."""

import asyncio
import json

import httpx
import msgspec
import pytest

from shared.models.deployment import StreamFailover
from shared.models.replica import ReplicaState
from tests.support.waiting import wait_until
from tests.unit.proxy.engine import Behaviour, Engine, Exchanged, hello
from tests.unit.proxy.rig import Rig, chat, replica

UNARMED = {"stream_failover": StreamFailover.OFF}
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
BUSY_BODY = b'{"error":{"message":"The engine is currently busy","code":503}}'


async def drop(exchanged: Exchanged) -> None:
    """Reset the connection without an answer."""
    exchanged.reset()


async def busy(exchanged: Exchanged) -> None:
    """Reject, as a full engine does."""
    await exchanged.whole(503, BUSY_BODY)


async def gateway(exchanged: Exchanged) -> None:
    """Answer as a gateway without a backend."""
    await exchanged.whole(502, b"bad gateway", "text/plain")


async def engine_dead(exchanged: Exchanged) -> None:
    """Answer as vLLM does when its engine process has died."""
    await exchanged.whole(500, json.dumps({"error": {"message": DEAD}}).encode())


async def engine_dead_in_stream(exchanged: Exchanged) -> None:
    """Begin a stream whose only event says that the engine has died."""
    await exchanged.begin_stream()
    await exchanged.event({"error": {"message": DEAD}})
    await exchanged.end_stream()


async def half_a_document(exchanged: Exchanged) -> None:
    """Cut a plain answer in the middle."""
    await exchanged.head(200, "application/json", "content-length: 100")
    exchanged.writer.write(b'{"half":')
    await exchanged.writer.drain()
    exchanged.writer.close()


async def empty_stream(exchanged: Exchanged) -> None:
    """Cut a stream before its first event."""
    await exchanged.begin_stream()
    exchanged.writer.close()


@pytest.mark.parametrize(
    "failing",
    [drop, busy, gateway, engine_dead, engine_dead_in_stream, half_a_document, empty_stream],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_another_replica_answers(failing: Behaviour, stream: bool) -> None:  # noqa: FBT001
    """Whatever the first replica does wrong before the first byte, the second one answers."""
    async with Engine(failing) as bad, Engine() as good, Rig(bad, good) as rig:
        answer = await rig.chat(stream=stream)
        assert answer.status_code == 200
        assert len(bad.seen) == len(good.seen) == 1
        assert rig.ledger.reserves()[-1].exclude == ("demo-0",)
        await wait_until(rig.idle)


@pytest.mark.parametrize("status", [400, 401, 404, 405, 422, 429])
async def test_client_errors_are_answers(status: int) -> None:
    """A 4xx is never sent to another replica."""
    body = json.dumps({"error": {"message": "no", "type": "BadRequestError", "code": status}})

    async def refuse(exchanged: Exchanged) -> None:
        await exchanged.whole(status, body.encode())

    async with Engine(refuse) as first, Engine(refuse) as second, Rig(first, second) as rig:
        answer = await rig.chat(stream=True)
        assert len(first.seen) + len(second.seen) == 1
        if status == 401:
            # The replica refused our key, not the client's.
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                502,
                "replica_key_refused",
            )
        else:
            assert (answer.status_code, answer.json()["error"]["message"]) == (status, "no")
        await wait_until(rig.idle)


async def test_ordinary_500_is_an_answer() -> None:
    """A 500 that does not speak of a dead engine is the client's to see."""

    async def fault(exchanged: Exchanged) -> None:
        await exchanged.whole(500, b'{"error":{"message":"boom"}}')

    async with Engine(fault) as engine, Rig(engine) as rig:
        answer = await rig.chat()
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "boom")


async def test_all_replicas_busy() -> None:
    """When every replica rejects, the client gets 429 with Retry-After."""
    async with Engine(busy) as first, Engine(busy) as second, Rig(first, second) as rig:
        answer = await rig.chat()
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "model_busy"
        assert len(first.seen) == len(second.seen) == 1
        await wait_until(rig.idle)


async def test_three_tries() -> None:
    """A request that kills what it reaches is given up after three replicas."""
    async with (
        Engine(drop) as a,
        Engine(drop) as b,
        Engine(drop) as c,
        Engine(drop) as d,
        Rig(a, b, c, d) as rig,
    ):
        answer = await rig.chat()
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == "replica_failed"
        assert sum(len(engine.seen) for engine in (a, b, c, d)) == 3
        await wait_until(rig.idle)


async def test_stale_connection() -> None:
    """A kept connection that the replica has closed costs no try: a fresh one carries it."""
    async with Engine() as engine, Rig(engine) as rig:
        await rig.chat()

        async def close_idle(exchanged: Exchanged) -> None:
            engine.behave = hello
            exchanged.writer.close()

        engine.behave = close_idle
        answer = await rig.chat()
        assert answer.status_code == 200
        assert engine.connections == 2
        assert len(rig.ledger.reserves()) == 2
        await wait_until(rig.idle)


async def test_poison_on_kept_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that kills replicas is given up after three, over kept connections too."""
    monkeypatch.setattr("services.proxy.exchange.STALE_S", 0.0)  # each replica dies after a while
    async with Engine() as a, Engine() as b, Engine() as c, Engine() as d, Rig(a, b, c, d) as rig:
        engines = (a, b, c, d)
        while not all(engine.connections for engine in engines):
            await asyncio.gather(*(rig.chat() for _ in engines))
        for engine in engines:
            engine.behave = drop
            engine.seen.clear()
        answer = await rig.chat()
        assert answer.json()["error"]["code"] == "replica_failed"
        assert sum(len(engine.seen) for engine in engines) == 3
        await wait_until(rig.idle)


async def test_single_replica_replaced() -> None:
    """With one replica, its requests outlive its death: they go on when its successor is READY."""
    silence = asyncio.Event()

    async def hang(exchanged: Exchanged) -> None:
        del exchanged
        await silence.wait()

    async with Engine(hang) as old, Rig(old) as rig, Engine() as new:
        calls = [asyncio.create_task(rig.chat(stream=bool(number % 2))) for number in range(6)]
        await wait_until(lambda: len(old.seen) == 6)
        await old.kill()
        await wait_until(lambda: not rig.ledger.held)
        rig.change()
        rig.change(replica("demo-1", new.url, gen=2))
        answers = await asyncio.gather(*calls)
        assert [answer.status_code for answer in answers] == [200] * 6
        await wait_until(rig.idle)


async def test_ended_replica_is_left() -> None:
    """A request that waits on a replica moves on when the table says that the replica has ended."""
    silence = asyncio.Event()

    async def hang(exchanged: Exchanged) -> None:
        del exchanged
        await silence.wait()

    async with Engine(hang) as frozen, Engine() as good, Rig(frozen, good) as rig:
        call = asyncio.create_task(rig.chat())
        await wait_until(lambda: frozen.seen)
        rig.change(
            msgspec.structs.replace(rig.replicas[0], state=ReplicaState.FAILED), rig.replicas[1]
        )
        assert (await call).status_code == 200
        silence.set()


async def test_no_replica_in_time() -> None:
    """Without any READY replica the client gets 503 with Retry-After after the hold."""
    async with Rig(hold_timeout_s=0.3) as rig:
        answer = await rig.chat()
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "no_replica_ready"


async def test_scaled_to_zero() -> None:
    """A model that is scaled to zero answers at once, and says how to change that."""
    async with Rig() as rig:
        rig.table.wanted = 0
        answer = await rig.chat()
        assert answer.status_code == 503
        assert "redmesh scale demo" in answer.json()["error"]["message"]


async def test_scaled_to_zero_with_many_waiting() -> None:
    """However many wait when their model is scaled to zero while Redis is away, all are told."""
    async with Rig() as rig:
        body = json.dumps(chat()).encode()
        clients = [await rig.raw(body) for _ in range(150)]
        await wait_until(lambda: rig.served.room.waiting == len(clients))
        for _ in range(3):
            rig.served.reservations.breaker.errored(0.0)
        rig.table.wanted = 0
        for reader, writer in clients:
            assert b" 503 " in await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
            writer.close()
        await wait_until(rig.idle)


async def test_full_replicas() -> None:
    """A request waits while all replicas are full, and gets the first place that becomes free."""
    go = asyncio.Event()

    async def gated(exchanged: Exchanged) -> None:
        await go.wait()
        await hello(exchanged)

    async with Engine(gated) as engine, Rig(engine) as rig:
        rig.change(msgspec.structs.replace(rig.replicas[0], max_requests=1))
        calls = [asyncio.create_task(rig.chat()) for _ in range(3)]
        await wait_until(lambda: rig.served.room.waiting == 2 and engine.seen)
        assert len(engine.seen) == 1
        go.set()
        assert [(await call).status_code for call in calls] == [200] * 3
        await wait_until(rig.idle)


async def test_full_for_too_long() -> None:
    """A request that finds no room in time gets 429; one more than may wait gets it at once."""
    silence = asyncio.Event()

    async def hang(exchanged: Exchanged) -> None:
        await silence.wait()
        await hello(exchanged)

    async with Engine(hang) as engine, Rig(engine, busy_timeout_s=0.5, max_held_requests=1) as rig:
        rig.change(msgspec.structs.replace(rig.replicas[0], max_requests=1))
        first = asyncio.create_task(rig.chat())
        await wait_until(lambda: engine.seen)
        waiting = asyncio.create_task(rig.chat())
        await wait_until(lambda: rig.served.room.waiting == 1)
        assert (await rig.chat()).status_code == 429
        assert not waiting.done()
        assert (await waiting).status_code == 429
        silence.set()
        assert (await first).status_code == 200


@pytest.mark.parametrize("at_boundary", [True, False])
async def test_cut_stream(at_boundary: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """A stream that breaks off ends as an error event and [DONE], never as a success."""

    async def cut(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        await exchanged.text("Hello")
        if not at_boundary:
            await exchanged.chunk(b'data: {"choi')
        exchanged.writer.close()

    async with Engine(cut) as engine, Rig(engine) as rig:
        answer = await rig.chat(stream=True)
        assert answer.text.endswith("data: [DONE]\n\n")
        events = [event for event in answer.text.split("\n\n") if event]
        error = json.loads(events[-2].removeprefix("data: "))["error"]
        assert error["code"] == "stream_broken"
        assert "Hello" in events[0]
        await wait_until(rig.idle)


async def test_silent_stream() -> None:
    """A stream that falls silent is ended as an error after the model's limit."""
    silence = asyncio.Event()

    async def freeze(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        await exchanged.text("Hello")
        await silence.wait()

    async with Engine(freeze) as engine, Rig(engine, spec={"inter_byte_timeout_s": 0.3}) as rig:
        answer = await rig.chat(stream=True)
        assert "was silent" in answer.text
        await wait_until(rig.idle)
        silence.set()


async def test_first_byte_deadline() -> None:
    """A request without a first byte ends as 504 at the model's deadline, aborted upstream."""

    async def hang(exchanged: Exchanged) -> None:
        await exchanged.abandoned()

    async with Engine(hang) as engine, Rig(engine, spec={"request_timeout_s": 0.3}) as rig:
        answer = await rig.chat()
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "request_timeout"
        await wait_until(lambda: engine.aborted == 1)
        await wait_until(rig.idle)


async def test_breaker_ejects() -> None:
    """A replica that fails three connections in a row is avoided while there is another."""
    async with Engine() as dead, Engine() as good, Rig(dead, good) as rig:
        await dead.kill()
        for _ in range(12):
            assert (await rig.chat()).status_code == 200
        assert rig.ledger.reserves()[-1].exclude == ("demo-0",)
        await wait_until(rig.idle)


async def test_shutting_down() -> None:
    """Answers that cannot finish end as errors: an event in a stream, 503 before the first byte."""
    silence = asyncio.Event()

    async def freeze(exchanged: Exchanged) -> None:
        if exchanged.json["stream"]:
            await exchanged.begin_stream()
            await exchanged.text("Hello")
        await silence.wait()

    async with Engine(freeze) as engine, Rig(engine) as rig:
        stream = asyncio.create_task(rig.chat(stream=True))
        plain = asyncio.create_task(rig.chat())
        await wait_until(lambda: len(engine.seen) == 2 and rig.served.table)
        await wait_until(
            lambda: any(holding.streamed for _, holding in rig.served.reservations.live.items())
        )
        rig.fleet.shut()
        assert "shutting down" in (await stream).text
        assert (await plain).json()["error"]["code"] == "shutting_down"
        silence.set()


async def test_unframed_stream_without_its_end() -> None:
    """A stream that ends with its connection and lacks [DONE] counts as cut."""

    async def old(exchanged: Exchanged) -> None:
        await exchanged.head(200, "text/event-stream", "connection: close")
        exchanged.writer.write(b'data: {"choices":[]}\n\n')
        await exchanged.writer.drain()
        exchanged.writer.close()

    async with Engine(old) as engine, Rig(engine, spec=UNARMED) as rig:
        answer = await rig.chat(stream=True)
        assert "stream_broken" in answer.text


async def test_nonsense_from_a_replica() -> None:
    """Bytes that are not HTTP count as a failure of the replica."""

    async def nonsense(exchanged: Exchanged) -> None:
        exchanged.writer.write(b"220 smtp ready\r\n\r\n")
        await exchanged.writer.drain()

    async with Engine(nonsense) as bad, Engine() as good, Rig(bad, good) as rig:
        assert (await rig.chat()).status_code == 200
        assert good.seen


async def test_anthropic_stream_error() -> None:
    """A stream of Anthropic's messages breaks off in Anthropic's words."""

    async def cut(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        await exchanged.chunk(b'event: message_start\ndata: {"type":"message_start"}\n\n')
        exchanged.writer.close()

    async with Engine(cut) as engine, Rig(engine) as rig:
        answer = await rig.http.post("/v1/messages", json=chat(stream=True))
        assert "event: error\ndata: " in answer.text


async def test_client_leaves_while_held() -> None:
    """A client that leaves while it waits leaves nothing behind."""
    async with Rig() as rig:
        with pytest.raises(httpx.ReadTimeout):
            await rig.http.post("/v1/chat/completions", json=chat(), timeout=0.3)
        await wait_until(rig.idle)
        assert rig.served.room.waiting == 0
