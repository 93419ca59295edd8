"""Each fault does what its order says, and clearing it makes the engine whole again."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from services.simengine.faults import parse_fault
from tests.support.waiting import wait_until
from tests.unit.simengine.driving import EngineProcess, Started, read_stream

Start = Callable[..., Awaitable[Started]]
Spawn = Callable[..., EngineProcess]
COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 3000, "ignore_eos": True}


def test_a_fault_is_written_as_kind_and_fields() -> None:
    """The flag's words become an order; wrong words are refused with the kinds that exist."""
    order = parse_fault("cut:after_tokens=5,count=2")
    assert (order.kind, order.after_tokens, order.count) == ("cut", 5, 2)
    for wrong in ("explode", "cut:after=5", "slow:factor=0", "crash:after_tokens=-1"):
        with pytest.raises(ValueError, match="kinds are"):
            parse_fault(wrong)


async def test_faults_are_taken_only_when_allowed(start: Start) -> None:
    """Without --allow-faults the route does not exist; with it, bad orders are 400."""
    plain, open_to = await start(), await start("--allow-faults")
    assert (await plain.post("/sim/faults", kind="freeze")).status_code == 404
    assert (await open_to.post("/sim/faults", kind="freese")).status_code == 400
    assert (await open_to.post("/sim/faults", kind="freeze", x=1)).status_code == 400


async def test_a_frozen_engine_looks_healthy_and_generates_nothing(start: Start) -> None:
    """Health and metrics stay 200 and still; clearing the fault lets the answer complete."""
    engine = await start("--allow-faults")
    await engine.ok("/sim/faults", kind="freeze")
    asking = asyncio.create_task(engine.ok(COMPLETIONS, prompt="a", max_tokens=3))
    await wait_until(lambda: len(engine.simulator.engine.in_flight) == 1, what="it is admitted")
    assert (await engine.client.get("/health")).status_code == 200
    metrics = (await engine.client.get("/metrics")).text
    assert 'vllm:num_requests_waiting{engine="0",model_name="tiny"} 0.0' in metrics
    assert not asking.done()
    await engine.ok("/sim/faults", kind="clear")
    assert (await asking)["usage"]["completion_tokens"] == 3


async def test_a_freeze_in_mid_stream_loses_no_token(start: Start) -> None:
    """A stream that was frozen goes on as if nothing had been."""
    engine = await start("--allow-faults")
    ask: dict[str, Any] = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "temperature": 0}
    whole = await engine.ok(COMPLETIONS, **ask)
    asking = asyncio.create_task(engine.stream(COMPLETIONS, **ask))
    runs = engine.simulator.engine
    await wait_until(lambda: any(run.produced > 5 for run in runs.in_flight), what="it streams")
    await engine.ok("/sim/faults", kind="freeze")
    await engine.ok("/sim/faults", kind="clear")
    assert (await asking).text == whole["choices"][0]["text"]


async def test_a_slow_engine_takes_longer_steps(start: Start) -> None:
    """A factor of 20 makes the planned steps 20 times as long."""
    engine = await start("--allow-faults", "--step-ms", "2")
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    await engine.ok("/sim/faults", kind="slow", factor=20.0)
    await engine.ok(COMPLETIONS, prompt="a", max_tokens=5, ignore_eos=True)
    assert loop.time() - begun_s >= 5 * 2e-3 * 20


async def test_rejections_are_counted_down(start: Start) -> None:
    """Two requests are refused as by a full queue, the third is served."""
    engine = await start("--allow-faults")
    await engine.ok("/sim/faults", kind="reject", count=2)
    statuses = [(await engine.post(COMPLETIONS, prompt="a")).status_code for _ in range(3)]
    assert statuses == [503, 503, 200]


async def test_a_cut_stream_ends_without_its_end(start: Start) -> None:
    """After its 7th token the connection closes in mid body; the next stream is whole."""
    engine = await start("--allow-faults")
    await engine.ok("/sim/faults", kind="cut", after_tokens=7, count=1)
    lines: list[str] = []

    async def read() -> None:
        async with engine.client.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as cut:
            async for line in cut.aiter_lines():
                lines.append(line)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
        await read()
    stream = read_stream("\n".join(lines))
    assert (len(stream.chunks), stream.done) == (7, False)
    assert engine.simulator.engine.in_flight == []
    assert (await engine.stream(COMPLETIONS, prompt="a", max_tokens=20)).done


async def test_a_dead_engine_ends_streams_with_the_error_and_done(start: Start) -> None:
    """Streams get the error event and [DONE], unary calls and new ones 500, health 503."""
    engine = await start("--allow-faults")
    streaming = asyncio.create_task(engine.stream(COMPLETIONS, **LONG))
    asking = asyncio.create_task(engine.post(COMPLETIONS, **LONG))
    await wait_until(lambda: len(engine.simulator.engine.in_flight) == 2, what="both run")
    await engine.ok("/sim/faults", kind="engine-dead")
    stream, response = await streaming, await asking
    assert stream.done
    assert stream.chunks[-1]["error"]["type"] == "InternalServerError"
    assert stream.chunks[-1]["error"]["code"] == 500
    assert response.status_code == 500
    assert response.json()["error"] == stream.chunks[-1]["error"]
    assert (await engine.client.get("/health")).status_code == 503
    assert (await engine.post(COMPLETIONS, prompt="a")).status_code == 500


def test_a_dead_engines_process_ends_with_1(spawn: Spawn) -> None:
    """Shortly after the engine core died the process is gone."""
    engine = spawn()
    httpx.post(f"{engine.url}/sim/faults", json={"kind": "engine-dead"})
    assert engine.process.wait(timeout=10) == 1


@pytest.mark.parametrize("order", [{}, {"after_tokens": 25}])
def test_a_crash_takes_the_process_at_once(spawn: Spawn, order: dict[str, int]) -> None:
    """No drain and no end of streams; with after_tokens the crash waits for that many tokens."""
    engine = spawn()
    httpx.post(f"{engine.url}/sim/faults", json={"kind": "crash", **order})
    if order:
        lines: list[str] = []

        def read() -> None:
            body = {**LONG, "stream": True}
            with httpx.stream("POST", f"{engine.url}{COMPLETIONS}", json=body) as crashing:
                for line in filter(None, crashing.iter_lines()):
                    lines.append(line)  # noqa: PERF402 - what came before the error counts

        with pytest.raises(httpx.RemoteProtocolError):
            read()
        assert len(lines) == 25
    assert engine.process.wait(timeout=10) == 70


def test_faults_can_be_in_force_from_the_start(spawn: Spawn) -> None:
    """--fault rejects the very first request."""
    engine = spawn("--fault", "reject:count=1")
    statuses = [
        httpx.post(f"{engine.url}{COMPLETIONS}", json={"prompt": "a", "max_tokens": 1}).status_code
        for _ in range(2)
    ]
    assert statuses == [503, 200]
