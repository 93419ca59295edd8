"""Streams that lose their replica go on from another as if nothing had happened.

The replicas are simulated engines in the test's own loop, which cut streams after a given token.
What a client gets is compared with what one engine answers alone.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any, Final

import httpx
import msgspec
import pytest

from services.proxy import serving
from services.simengine.arguments import parse
from services.simengine.main import Simulator, bind
from shared.models.deployment import StreamFailover
from shared.models.replica import ReplicaState
from tests.support.answers import Answer, blank, read, same
from tests.support.waiting import wait_until
from tests.unit.proxy.engine import Engine, Exchanged
from tests.unit.proxy.rig import MODEL, Rig, replica

FLAGS: Final = (
    *("--allow-faults", "--step-ms", "1"),
    *("--prefill-us-per-token", "0", "--decode-us-per-seq", "0", "--mean-answer-tokens", "0"),
)
CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
PLAIN: Final = {"content-type": "text/plain"}
PROMPT: Final = "Tell me of rivers, résumé and 東京"


class Sim:
    """A simulated engine that can be told to cut streams."""

    def __init__(self, simulator: Simulator) -> None:
        self.url = f"http://127.0.0.1:{simulator.server.port}"

    async def cut(self, after_tokens: int, count: int = 1) -> None:
        """Cut the next `count` streams after so many tokens."""
        await self.suffer(kind="cut", after_tokens=after_tokens, count=count)

    async def suffer(self, **order: object) -> None:
        """Put a fault in force."""
        async with httpx.AsyncClient(base_url=self.url, timeout=20) as client:
            assert (await client.post("/sim/faults", json=order)).status_code == 200


@contextlib.asynccontextmanager
async def sims(count: int = 2, *flags: str) -> AsyncGenerator[list[Sim]]:
    """Run `count` engines with the same weights."""
    begun: list[Simulator] = []
    for _ in range(count):
        argv = ["--model", "m", "--served-model-name", MODEL, "--port", "0", *FLAGS, *flags]
        simulator = Simulator(parse(argv, {}), asyncio.get_running_loop())
        await simulator.start(bind("127.0.0.1", 0))
        begun.append(simulator)
    try:
        yield [Sim(simulator) for simulator in begun]
    finally:
        for simulator in begun:
            await simulator.stop(flush=True)


def request(path: str, **fields: object) -> dict[str, Any]:
    """Make a greedy stream request of thirty tokens."""
    asked: dict[str, Any] = {
        "model": MODEL,
        "stream": True,
        "max_tokens": 30,
        "temperature": 0,
        **fields,
    }
    if path == CHAT:
        asked.setdefault("messages", [{"role": "user", "content": PROMPT}])
    else:
        asked.setdefault("prompt", PROMPT)
    return asked


async def alone(sim: Sim, path: str, asked: dict[str, Any]) -> Answer:
    """Ask one engine without a proxy."""
    async with httpx.AsyncClient(base_url=sim.url, timeout=20) as client:
        return read((await client.post(path, json=asked)).content)


def failovers(rig: Rig, outcome: str) -> float:
    """Count what became of streams that lost their replica."""
    labels = {"model": MODEL, "outcome": outcome}
    name = "redmesh_proxy_stream_failovers_total"
    return rig.metrics.registry.get_sample_value(name, labels) or 0.0


KINDS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "chat": (CHAT, {}),
    "completion": (COMPLETIONS, {}),
    "usage": (CHAT, {"stream_options": {"include_usage": True}}),
    "running usage": (
        COMPLETIONS,
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "chat's running usage": (
        CHAT,
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "chat logprobs": (CHAT, {"logprobs": True, "top_logprobs": 2}),
    "chat logprobs without top": (CHAT, {"logprobs": True}),
    "completion logprobs": (COMPLETIONS, {"logprobs": 2, "max_tokens": 60}),
    "ids": (CHAT, {"return_token_ids": True}),
    "min_tokens": (CHAT, {"min_tokens": 20, "max_tokens": 40}),
    "no limit": (CHAT, {"max_tokens": None}),
    "completion's own limit": (COMPLETIONS, {"max_tokens": 16}),
    "ignore_eos": (COMPLETIONS, {"ignore_eos": True}),
    "special tokens": (CHAT, {"skip_special_tokens": False}),
    "seed": (CHAT, {"temperature": 0.8, "seed": 7}),
    "seed and logprobs": (COMPLETIONS, {"temperature": 1.0, "seed": 7, "logprobs": 1}),
    "presence penalty": (CHAT, {"presence_penalty": 0.5}),
    "response format": (CHAT, {"response_format": {"type": "json_object"}}),
    "text format": (CHAT, {"response_format": {"type": "text"}, "tools": [], "user": "me"}),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_goes_on_as_if_undisturbed(kind: str) -> None:
    """Cut anywhere, each kind of stream that is exact gives what it gives undisturbed."""
    path, fields = KINDS[kind]
    asked = request(path, **fields)
    flags = ("--mean-answer-tokens", "25") if kind == "no limit" else ()
    async with sims(2, *flags) as (first, second), Rig(first, second) as rig:
        wanted = await alone(second, path, asked)
        for cut in (1, 2, 3, 5, 8, 13, 21, 29):
            await first.cut(cut)
            answer = await rig.http.post(path, json=asked)
            await first.suffer(kind="clear")
            same(read(answer.content), wanted)
        assert failovers(rig, "exact") >= 4
        await wait_until(rig.idle)


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_stop_strings_straddle_the_seam(path: str, shown: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """Wherever the cut falls, also within a stop string, the answer stops there all the same."""
    async with sims() as (first, second), Rig(first, second) as rig:
        text = (await alone(second, path, request(path))).text
        middle = len(text) * 2 // 3
        for stop in (text[middle : middle + 9], text[middle + 3 : middle + 5]):
            asked = request(path, stop=[stop, "never said"], include_stop_str_in_output=shown)
            wanted = await alone(second, path, asked)
            assert wanted.finish[0][0] == "stop"
            for cut in range(1, 25, 2):
                await first.cut(cut)
                answer = await rig.http.post(path, json=asked)
                await first.suffer(kind="clear")
                same(read(answer.content), wanted)
        assert failovers(rig, "exact") >= 8


async def test_three_failovers_and_no_fourth() -> None:
    """A stream goes on three times; the fourth loss ends it with an error event."""
    asked = request(CHAT, max_tokens=60)
    async with sims() as (first, second), Rig(first, second) as rig:
        wanted = await alone(second, CHAT, asked)
        await first.cut(7, count=2)
        await second.cut(9, count=1)
        same(read((await rig.http.post(CHAT, json=asked)).content), wanted)
        assert failovers(rig, "exact") == 3
        await first.cut(7, count=2)
        await second.cut(9, count=2)
        broken = read((await rig.http.post(CHAT, json=asked)).content)
        assert wanted.text.startswith(broken.text)
        assert broken.errors[0]["code"] == "stream_broken"
        assert "3 times" in broken.errors[0]["message"]
        assert broken.finish == []
        await wait_until(rig.idle)


async def test_sampled_streams_go_on_validly() -> None:
    """Without a seed a stream goes on with another sample: whole, and never with a wrong byte."""
    asked = request(CHAT, temperature=0.9, stream_options={"include_usage": True})
    async with sims() as (first, second), Rig(first, second) as rig:
        for cut in range(2, 26, 3):
            await first.cut(cut)
            got = read((await rig.http.post(CHAT, json=asked)).content)
            await first.suffer(kind="clear")
            assert (got.errors, got.finish, got.done) == ([], [("length", None)], True)
            assert got.usage["completion_tokens"] == 30
            assert "\ufffd" not in got.text
            assert "rivers" not in got.text.split("résumé")[0]
        assert failovers(rig, "valid") >= 6


async def test_sampled_streams_end_where_only_exact_ones_go_on() -> None:
    """A deployment can decline other samples: such a stream then ends with an error event."""
    spec = {"stream_failover": StreamFailover.EXACT}
    async with sims() as (first, second), Rig(first, second, spec=spec) as rig:
        await first.cut(5)
        got = read((await rig.http.post(CHAT, json=request(CHAT, temperature=0.9))).content)
        assert "only exact streams" in got.errors[0]["message"]
        assert failovers(rig, "refused") == 1


async def test_switched_off() -> None:
    """With failover off nothing is asked of the replica beyond what the client asked."""
    seen: list[dict[str, Any]] = []

    async def cut(exchanged: Exchanged) -> None:
        seen.append(exchanged.json)
        await exchanged.begin_stream()
        await exchanged.text("Hello")
        exchanged.reset()

    spec = {"stream_failover": StreamFailover.OFF}
    async with Engine(cut) as first, Engine(cut) as second, Rig(first, second, spec=spec) as rig:
        asked = request(CHAT)
        answer = await rig.http.post(CHAT, json=asked)
        assert "stream_broken" in answer.text
        assert seen == [asked]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1, "n": 2},
        {"prompt_logprobs": 1},
        {"temperature": 1, "response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"},
    ],
    ids=["choices", "prompt logprobs", "sampled grammar", "tools"],
)
async def test_refused_kinds_end_with_an_error_event(fields: dict[str, Any]) -> None:
    """What cannot go on ends with an error of OpenAI's shape that says why, and [DONE]."""
    ids = {"prompt_token_ids": [1, 2], "token_ids": [3]}

    async def cut(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        choice = {"index": 0, "delta": {"content": "x"}, "finish_reason": None, **ids}
        await exchanged.event({"id": "chatcmpl-1", "choices": [choice]})
        exchanged.reset()

    async with Engine(cut) as first, Engine(cut) as second, Rig(first, second) as rig:
        answer = await rig.http.post(CHAT, json=request(CHAT, **fields))
        body = answer.text
        assert answer.status_code == 200
        error = json.loads(body.split("data: ")[-2])["error"]
        assert (error["code"], error["type"]) == ("stream_broken", "server_error")
        assert body.endswith("data: [DONE]\n\n")
        assert len(first.seen) + len(second.seen) == 1


async def test_the_client_sees_no_ids_it_did_not_ask_for() -> None:
    """An armed stream shows the keys that it shows unarmed, and no values of token ids."""
    async with sims(1) as (sim,), Rig(sim) as rig:
        for path in (CHAT, COMPLETIONS):
            asked = request(path)
            async with httpx.AsyncClient(base_url=sim.url) as client:
                wanted = (await client.post(path, json=asked)).content
            got = (await rig.http.post(path, json=asked)).content
            assert blank(got) == blank(wanted)
            shown = read(
                (await rig.http.post(path, json={**asked, "return_token_ids": True})).content
            )
            assert len(shown.ids) == 30


async def test_plain_text_goes_on() -> None:
    """A text/plain answer goes on too; the client sees one text."""
    async with sims() as (first, second), Rig(first, second) as rig:
        target = "/v1/chat/demo?max_tokens=30&temperature=0"
        wanted = (await rig.http.post(target, content=PROMPT, headers=PLAIN)).text
        for cut in (1, 4, 17):
            await first.cut(cut)
            assert (await rig.http.post(target, content=PROMPT, headers=PLAIN)).text == wanted
        assert failovers(rig, "exact") == 3


async def test_an_engine_that_says_it_is_dead_is_left() -> None:
    """The error event of a dying engine is not passed on: the stream goes on."""
    asked = request(CHAT, max_tokens=200)
    async with sims() as (first, second), Rig(first, second) as rig:
        wanted = await alone(second, CHAT, asked)
        reading = asyncio.create_task(rig.http.post(CHAT, json=asked))
        await wait_until(lambda: any(e.streamed for _, e in rig.served.reservations.live.items()))
        await first.suffer(kind="engine-dead")
        same(read((await reading).content), wanted)
        assert failovers(rig, "exact") == 1


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("usage", [False, True])
async def test_a_stream_that_lost_only_its_end_is_ended(usage: bool, done: bool) -> None:  # noqa: FBT001 - parameters of the test
    """When the finish reason was delivered, the usage and [DONE] are told without a replica.

    They are told once, also where the replica died after them and before its last chunk.
    """
    told = {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1} if usage else None

    async def nearly(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        known = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        await exchanged.event({**known, "choices": [role], "prompt_token_ids": [1, 2, 3]})
        last = {"index": 0, "delta": {"content": "x"}, "finish_reason": "stop", "token_ids": [9]}
        await exchanged.event({**known, "choices": [last]})
        if done:
            if usage:
                await exchanged.event({**known, "choices": [], "usage": told})
            await exchanged.event("[DONE]")
        exchanged.reset()

    options = {"stream_options": {"include_usage": True}} if usage else {}
    async with Engine(nearly) as first, Engine(nearly) as second, Rig(first, second) as rig:
        answer = await rig.http.post(CHAT, json=request(CHAT, **options))
        got = read(answer.content)
        assert (got.text, got.finish, got.errors, got.done) == ("x", [("stop", None)], [], True)
        assert answer.text.count("[DONE]") == 1
        assert answer.text.count("usage") == usage
        assert got.usage == told
        assert len(first.seen) + len(second.seen) == 1
        await wait_until(rig.idle)


@pytest.mark.parametrize(
    ("path", "fields", "end"),
    [
        (CHAT, {}, ("length", None)),
        (CHAT, {"stream_options": {"include_usage": True}}, ("length", None)),
        (COMPLETIONS, {}, ("length", None)),
        (CHAT, {"stop_token_ids": [3, 9]}, ("stop", 9)),
        (CHAT, {"stop": "z"}, None),
        (COMPLETIONS, {"skip_special_tokens": False}, None),
    ],
    ids=["chat", "usage", "completion", "stop token", "stop string", "special tokens"],
)
async def test_a_sampled_stream_that_lost_only_its_finish_is_ended(
    path: str, fields: dict[str, Any], end: tuple[str, int | None] | None
) -> None:
    """With all its tokens delivered a sampled stream is finished here, if it is known how."""

    async def nearly(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        known = {"id": "x-1", "object": "o", "created": 1, "model": "m"}
        prompt = {"prompt_token_ids": [1, 2, 3]}
        for text, token in (("x", 8), ("y", 9)):
            said = {"delta": {"content": text}} if path == CHAT else {"text": text}
            choice = {"index": 0, **said, "finish_reason": None, "token_ids": [token], **prompt}
            await exchanged.event({**known, "choices": [choice], **prompt})
            prompt = {}
        exchanged.reset()

    asked = request(path, temperature=0.9, max_tokens=2, **fields)
    async with Engine(nearly) as first, Engine(nearly) as second, Rig(first, second) as rig:
        answer = await rig.http.post(path, json=asked)
        got = read(answer.content)
        assert got.text == "xy"
        assert len(first.seen) + len(second.seen) == 1, "nobody is asked for no token"
        if end is None:
            assert "only its replica knew" in got.errors[0]["message"]
            return
        assert (got.finish, got.errors, got.done) == ([end], [], True)
        ids = {json.loads(line[6:])["id"] for line in answer.text.split("\n\n")[:-2]}
        assert ids == {"x-1"}
        usage = {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2}
        assert got.usage == (usage if "stream_options" in fields else None)
        await wait_until(rig.idle)


async def test_waits_for_a_replica_to_come() -> None:
    """With nobody else to go on, a stream waits for a replica, like a request does."""
    asked = request(CHAT)
    async with sims() as (first, second), Rig(first) as rig:
        wanted = await alone(second, CHAT, asked)
        await first.cut(9)
        lone = rig.replicas[0]
        reading = asyncio.create_task(rig.http.post(CHAT, json=asked))
        await wait_until(lambda: failing(rig) == 1)
        gone = msgspec.structs.replace(lone, state=ReplicaState.FAILED)
        rig.change(gone, replica("demo-9", second.url))
        same(read((await reading).content), wanted)


def failing(rig: Rig) -> float:
    """Count the tries that ended with a reset."""
    labels = {"model": MODEL, "reason": "reset"}
    return rig.metrics.registry.get_sample_value("redmesh_proxy_retries_total", labels) or 0.0


async def test_nobody_comes() -> None:
    """Where no replica comes within the hold time, the stream ends with an error event."""
    async with sims(1) as (only,), Rig(only, hold_timeout_s=0.5) as rig:
        await only.cut(9, count=9)
        rig.change(rig.replicas[0])
        reading = asyncio.create_task(rig.http.post(CHAT, json=request(CHAT)))
        await wait_until(lambda: failing(rig) == 1)
        rig.change(msgspec.structs.replace(rig.replicas[0], state=ReplicaState.FAILED))
        got = read((await reading).content)
        assert got.errors[0]["code"] == "stream_broken"
        assert got.done
        assert failovers(rig, "failed") == 1
        await wait_until(rig.idle)


async def test_another_answer_is_never_stitched_on() -> None:
    """A replica that does not repeat what was delivered is not believed: the next one is asked."""
    asked = request(CHAT, temperature=0.7, seed=5)
    async with sims() as (first, second), Rig(first, second) as rig:
        wanted = await alone(second, CHAT, asked)
        await first.cut(12)

        async def other(exchanged: Exchanged) -> None:
            body = {**exchanged.json, "seed": 6}
            async with httpx.AsyncClient(base_url=second.url) as client:
                answer = await client.post(exchanged.path, json=body)
            await exchanged.whole(200, answer.content, "text/event-stream")

        async with Engine(other) as liar:
            rig.change(rig.replicas[0], replica("demo-1", liar.url))
            got = read((await rig.http.post(CHAT, json=asked)).content)
        same(got, wanted)
        assert failovers(rig, "exact") == 1


async def test_an_unhealthy_replica_is_left() -> None:
    """When the fleet finds a replica standing still, its requests and streams go elsewhere."""
    asked = request(CHAT, max_tokens=200)
    async with sims() as (first, second), Rig(first, second) as rig:
        wanted = await alone(second, CHAT, asked)
        reading = asyncio.create_task(rig.http.post(CHAT, json=asked))
        await wait_until(lambda: any(e.streamed for _, e in rig.served.reservations.live.items()))
        await first.suffer(kind="freeze")
        whole = {**asked, "stream": False}
        unary = [asyncio.create_task(rig.http.post(CHAT, json=whole)) for _ in range(2)]
        await wait_until(lambda: rig.fleet.in_flight() == 3)
        still = msgspec.structs.replace(rig.replicas[0], state=ReplicaState.UNHEALTHY)
        rig.change(still, rig.replicas[1])
        for answer in await asyncio.gather(*unary):
            assert answer.json()["usage"]["completion_tokens"] == 200
        same(read((await reading).content), wanted)
        await wait_until(rig.idle)


async def test_a_replica_that_is_well_again_is_trusted_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """UNHEALTHY for a moment and then READY: its streams may be as silent as any, and stay."""
    monkeypatch.setattr(serving, "ENDED_GRACE_S", 0.2)
    quiet, loop = asyncio.Event(), asyncio.get_running_loop()
    known = {"id": "x-1", "object": "o", "created": 1, "model": "m"}

    async def pausing(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        for text, token, finish in (("x", 8, None), ("y", 9, "stop")):
            choice = {"index": 0, "delta": {"content": text}, "token_ids": [token]}
            choices = [{**choice, "finish_reason": finish}]
            await exchanged.event({**known, "choices": choices, "prompt_token_ids": [1]})
            await quiet.wait()
        await exchanged.end_stream()

    async with Engine(pausing) as first, Engine(pausing) as second, Rig(first, second) as rig:
        reading = asyncio.create_task(rig.http.post(CHAT, json=request(CHAT)))
        await wait_until(lambda: any(e.streamed for _, e in rig.served.reservations.live.items()))
        well = list(rig.replicas)
        still = [msgspec.structs.replace(each, state=ReplicaState.UNHEALTHY) for each in well]
        rig.change(*still)
        rig.change(*well)
        began_s = loop.time()
        await wait_until(lambda: loop.time() > began_s + 4 * (0.2 + serving.SWEEP_S))
        quiet.set()
        got = read((await reading).content)
        assert (got.text, got.errors, got.done) == ("xy", [], True)
        assert len(first.seen) + len(second.seen) == 1
        await wait_until(rig.idle)
