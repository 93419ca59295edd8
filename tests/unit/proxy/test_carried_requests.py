"""Streams of real requests are carried, and nothing about their answers tells."""

import asyncio
import json
from typing import Final

import httpx
import pytest

from services.proxy.continuation.tape import Tape
from shared.models.deployment import StreamFailover
from tests.support.answers import read, same
from tests.support.waiting import wait_until
from tests.unit.proxy.rig import Rig
from tests.unit.proxy.test_stream_failover import CHAT, COMPLETIONS, alone, request, sims

POLICIES: Final = (StreamFailover.OFF, StreamFailover.EXACT)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("policy", POLICIES)
async def test_a_carried_answer_is_the_engines_own(policy: StreamFailover, path: str) -> None:
    """With the carrier and without it: the same answer; with it hardly a token is Python's."""
    asked = request(path, max_tokens=200, stream_options={"include_usage": True})
    async with sims(1) as (sim,):
        wanted = await alone(sim, path, asked)
        for carried in (True, False):
            async with Rig(sim, spec={"stream_failover": policy}, carrier=carried) as rig:
                got = (await rig.http.post(path, json=asked)).content
                carrier = rig.fleet.carrier
                assert (carrier is not None) == carried
                if carrier is not None:
                    assert carrier.tokens > 150
                    assert carrier.streams == 0
            same(read(got), wanted)


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_client_that_leaves_is_let_go_at_once(policy: StreamFailover) -> None:
    """Its replica is told by the end of the connection, and its stream is carried no more."""
    asked = json.dumps(request(CHAT, max_tokens=1500, ignore_eos=True)).encode()
    async with sims(1) as (sim,), Rig(sim, spec={"stream_failover": policy}) as rig:
        carrier = rig.fleet.carrier
        assert carrier is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        writer.write(head.encode() + b"content-length: %d\r\n\r\n%b" % (len(asked), asked))
        await reader.readuntil(b"\n\n\r\n")
        await wait_until(lambda: carrier.streams == 1, what="it is carried")
        rig.fleet.collect()
        assert rig.metrics.registry.get_sample_value("redmesh_proxy_carried_streams") == 1.0
        writer.close()
        await wait_until(lambda: not rig.ledger.held, what="its reservation is given back")
        assert carrier.streams == 0
        async with httpx.AsyncClient(base_url=sim.url) as client:
            await wait_until(lambda: _idle(client), what="the engine has stopped")


async def _idle(client: httpx.AsyncClient) -> bool:
    text = (await client.get("/metrics")).text
    running = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
    return bool(running) and running[0].endswith(" 0.0")


async def test_silence_counts_from_what_was_carried() -> None:
    """A stream is not silent while it is carried, however long; a frozen replica's is, in time."""
    spec = {"stream_failover": StreamFailover.EXACT, "inter_byte_timeout_s": 0.6}
    asked = request(CHAT, max_tokens=60, ignore_eos=True)
    async with sims(2, "--step-ms", "40") as (first, second):
        wanted = await alone(first, CHAT, asked)
        async with Rig(first, second, spec=spec) as rig:
            answer = asyncio.create_task(rig.http.post(CHAT, json=asked, timeout=30))
            carrier = rig.fleet.carrier
            assert carrier is not None
            await wait_until(lambda: carrier.streams == 1, what="it is carried")
            await asyncio.sleep(1.2)  # twice the deadline: tokens come meanwhile
            assert carrier.streams == 1
            await first.suffer(kind="freeze")
            got = read((await answer).content)
            same(got, wanted)
            names = {"model": "demo", "outcome": "exact"}
            value = rig.metrics.registry.get_sample_value
            assert value("redmesh_proxy_stream_failovers_total", names) == 1.0
            assert value("redmesh_proxy_stream_events_total", {"model": "demo"}) == 60


async def test_the_tape_knows_what_was_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica lost in mid-flight: the continuation begins where the carrier stopped."""
    told: list[int] = []
    carried = Tape.carried

    def note(tape: Tape, ids: "list[int]", chars: int) -> None:
        told.append(len(ids))
        carried(tape, ids, chars)  # type: ignore[arg-type] - an array

    monkeypatch.setattr(Tape, "carried", note)
    asked = request(CHAT, max_tokens=80, ignore_eos=True)
    async with sims(2) as (first, second):
        wanted = await alone(first, CHAT, asked)
        async with Rig(first, second, spec={"stream_failover": StreamFailover.EXACT}) as rig:
            await first.cut(after_tokens=50)
            got = (await rig.http.post(CHAT, json=asked)).content
        same(read(got), wanted)
    assert sum(told) > 30
