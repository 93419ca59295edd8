"""An end without a finish reason is no end: such a stream goes on like one whose replica died.

The first replica passes on what a simulated engine says, up to an event, and then ends the answer
in a way that looks well: nothing is reset, and no word of an error is said.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import httpx
import pytest

from tests.support.answers import read, same
from tests.support.waiting import wait_until
from tests.unit.proxy.engine import Engine, Exchanged
from tests.unit.proxy.rig import Rig
from tests.unit.proxy.test_stream_failover import CHAT, COMPLETIONS, alone, failovers, request, sims

End = Callable[[Exchanged], Awaitable[None]]


def answering(rig: Rig) -> bool:
    """Tell whether the client of the only request in flight has seen something of its answer."""
    return any(each.streamed for _, each in rig.served.reservations.live.items())


async def done(exchanged: Exchanged) -> None:
    """Say that this was all."""
    await exchanged.end_stream()


async def clean_end(exchanged: Exchanged) -> None:
    """End the chunked body as it should be ended."""
    await exchanged.chunk(b"")


async def garbled(exchanged: Exchanged) -> None:
    """Send a chunk that is no JSON, and end well."""
    await exchanged.chunk(b'data: {"choices":[{"index":0,"del\n\n')
    await exchanged.end_stream()


async def half_an_event(exchanged: Exchanged) -> None:
    """Begin an event, and end the body within it."""
    await exchanged.chunk(b'data: {"id":"chatcmpl-1","choices":[{"index":0,')
    await exchanged.chunk(b"")


ENDS: Final[dict[str, End]] = {
    "[DONE]": done,
    "a clean end": clean_end,
    "an unparsable chunk": garbled,
    "half an event": half_an_event,
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("end", ENDS)
async def test_a_stream_that_ends_without_a_finish_reason_goes_on(end: str, path: str) -> None:
    """However well it ends, without a finish reason another replica goes on with it, exactly."""
    asked = request(path, stream_options={"include_usage": True})
    cuts = (1, 2, 9, 29)

    async with sims(1) as (sim,):

        async def ends_early(exchanged: Exchanged) -> None:
            after_events = cuts[len(first.seen) - 1]
            events = 0
            async with (
                httpx.AsyncClient(base_url=sim.url, timeout=20) as client,
                client.stream("POST", exchanged.path, json=exchanged.json) as answer,
            ):
                await exchanged.begin_stream()
                async for line in answer.aiter_lines():
                    if events == after_events:
                        break
                    if line:
                        await exchanged.chunk(f"{line}\n\n".encode())
                        events += 1
            await wait_until(lambda: answering(rig), what="the client has seen something")
            await ENDS[end](exchanged)

        async with Engine(ends_early) as first, Rig(first, sim) as rig:
            wanted = await alone(sim, path, asked)
            for _ in cuts:
                same(read((await rig.http.post(path, json=asked)).content), wanted)
            assert len(first.seen) == len(cuts)
            assert failovers(rig, "exact") >= 1
            await wait_until(rig.idle)


@pytest.mark.parametrize("end", ENDS)
async def test_an_answer_without_a_beginning_is_asked_for_elsewhere(end: str) -> None:
    """A stream that ends before its first event has told nothing: the request is retried."""

    async def empty(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        await ENDS[end](exchanged)

    asked = request(CHAT)
    async with sims(1) as (sim,), Engine(empty) as first, Rig(first, sim) as rig:
        wanted = await alone(sim, CHAT, asked)
        same(read((await rig.http.post(CHAT, json=asked)).content), wanted)
        assert len(first.seen) == 1
        assert failovers(rig, "exact") == 0
        await wait_until(rig.idle)


@pytest.mark.parametrize("end", ENDS)
async def test_where_nobody_goes_on_an_unfinished_stream_is_an_error(end: str) -> None:
    """What may not go on ends with an error event, never as if it had been whole."""
    asked: dict[str, Any] = request(CHAT, temperature=1, response_format={"type": "json_object"})

    async def ends_early(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        known = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        await exchanged.event({**known, "choices": [role], "prompt_token_ids": [1, 2, 3]})
        said = {"index": 0, "delta": {"content": "{"}, "finish_reason": None, "token_ids": [9]}
        await exchanged.event({**known, "choices": [said]})
        await wait_until(lambda: answering(rig), what="the client has seen something")
        await ENDS[end](exchanged)

    async with Engine(ends_early) as first, Engine(ends_early) as second, Rig(first, second) as rig:
        got = read((await rig.http.post(CHAT, json=asked)).content)
        assert (got.finish, [error["code"] for error in got.errors]) == ([], ["stream_broken"])
        assert len(first.seen) + len(second.seen) == 1
        assert failovers(rig, "refused") == 1
        await wait_until(rig.idle)
