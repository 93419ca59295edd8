"""Streams of real vLLM go on from another replica, byte for byte.

A proxy in the test's own loop talks to one engine through two doors, of which the one that is
tried first slams after so many tokens: so every kind of request is cut at many places.
`test_engine_death` has a whole mesh whose engines are killed.
"""

import json
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
import pytest

from shared.secret import Secret, replica_api_key
from tests.support.answers import Answer, read, same
from tests.support.mesh import Mesh, ready_replicas
from tests.unit.proxy.engine import Engine, Exchanged
from tests.unit.proxy.rig import MODEL, Rig

pytestmark = [pytest.mark.engine, pytest.mark.mesh, pytest.mark.timeout(420)]

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
PROMPT: Final = "What happens when a replica dies?"
TOKENS: Final = 40
CUTS: Final = (0, 1, 4, 13, 21, 29)
"""After how many tokens the door slams, at the end of an event; 0 is after the first event, which
is a chat's role. Not a number of events: a busy engine puts several tokens into one."""

NOISE: Final = 0.1
"""Of log probabilities, on a processor whose sums depend on what is computed together: 1.5e-3 was
seen, where a prompt was in the cache. A bfloat16 between 8 and 16 has steps of 0.06, and another
token's log probability is another one altogether."""

USAGE: Final = {"stream_options": {"include_usage": True}}
KINDS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "chat": (CHAT, {}),
    "completion": (COMPLETIONS, USAGE),
    "usage": (CHAT, USAGE),
    "running usage": (
        CHAT,
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "chat logprobs": (CHAT, {"logprobs": True}),
    "chat top logprobs": (CHAT, {"logprobs": True, "top_logprobs": 2}),
    "completion logprobs": (COMPLETIONS, {"logprobs": 2}),
    "ids": (COMPLETIONS, {"return_token_ids": True}),
    "min_tokens": (CHAT, {"min_tokens": TOKENS - 5, "ignore_eos": False}),
    "to the end": (CHAT, {"ignore_eos": False, "max_tokens": 100}),
    "stop": (CHAT, {"stop": ["the stream", "replica"], **USAGE}),
    "stop shown": (CHAT, {"stop": ["replica"], "include_stop_str_in_output": True}),
    "repetition": (CHAT, {"repetition_penalty": 1.3}),
    "frequency": (CHAT, {"frequency_penalty": 1.5}),
    "presence": (COMPLETIONS, {"presence_penalty": 1.5}),
    "seed": (CHAT, {"temperature": 1.0, "seed": 11}),
    "grammar": (CHAT, {"response_format": {"type": "json_object"}, "ignore_eos": False}),
}

STOPPED: Final = {"stop": {"the stream", "replica"}, "stop shown": {"replica"}}
"""Kind → the strings of which one ends the answer."""


@asynccontextmanager
async def doors(mesh: Mesh) -> AsyncGenerator[tuple[Rig, dict[str, Any]]]:
    """Give a proxy before one real engine behind two doors, and their orders.

    The next stream is cut after `cut_after` tokens, if that is not None, and no other. The orders
    also count the cuts, and those of them that were `bare`: after ids without any text.
    """
    async with mesh.registry() as registry:
        target = next(iter((await ready_replicas(registry, "demo")).values()))
    secret = Secret((mesh.state.path / "fleet-secret").read_text().strip())
    key = replica_api_key(secret, target.rid, target.gen)
    orders: dict[str, Any] = {"cut_after": None, "cuts": 0, "bare": 0}
    async with httpx.AsyncClient(
        base_url=target.url, timeout=60, headers={"authorization": f"Bearer {key}"}
    ) as client:

        async def door(exchanged: Exchanged) -> None:
            cut_after, orders["cut_after"] = orders["cut_after"], None
            async with client.stream("POST", exchanged.path, json=exchanged.json) as answer:
                if answer.status_code != 200:
                    await exchanged.whole(answer.status_code, await answer.aread())
                    return
                await exchanged.begin_stream()
                tokens = 0
                async for line in answer.aiter_lines():
                    if not line:
                        continue
                    await exchanged.chunk(f"{line}\n\n".encode())
                    if cut_after is None or line == "data: [DONE]":
                        continue
                    chunk = json.loads(line[6:])
                    tokens += _tokens(chunk)
                    if tokens >= cut_after:
                        orders["cuts"] += 1
                        orders["bare"] += _bare(chunk)
                        exchanged.reset()
                        return
                await exchanged.chunk(b"")

        async with (
            Engine(door) as first,
            Engine(door) as second,
            Rig(first, second) as rig,
        ):
            rig.http.timeout = httpx.Timeout(120)  # an engine's first log probabilities take long
            yield rig, orders


def _tokens(chunk: dict[str, Any]) -> int:
    return sum(len(choice.get("token_ids") or ()) for choice in chunk["choices"])


def _bare(chunk: dict[str, Any]) -> bool:
    (choice,) = chunk["choices"]
    text = choice["delta"].get("content") if "delta" in choice else choice["text"]
    return bool(choice.get("token_ids")) and not text


def request(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Make a greedy stream request."""
    prompt: dict[str, Any] = (
        {"messages": [{"role": "user", "content": PROMPT}]} if path == CHAT else {"prompt": PROMPT}
    )
    asked = {"model": MODEL, "stream": True, "max_tokens": TOKENS, "temperature": 0}
    return {**asked, "ignore_eos": True, **prompt, **fields}


async def check(
    rig: Rig, orders: dict[str, Any], path: str, asked: dict[str, Any]
) -> tuple[Answer, int]:
    """Compare the engine's own answer with ours, undisturbed and cut.

    Returns it, and how many were cut.
    """
    # Not armed: what a client sees without a proxy, field for field.
    wanted = read((await rig.http.post(f"{rig.engines[1].url}{path}", json=asked)).content)
    assert wanted.done, wanted
    assert wanted.finish, wanted
    same(read((await rig.http.post(path, json=asked)).content), wanted, noise=NOISE)
    before = orders["cuts"]
    for cut in CUTS:
        orders["cut_after"] = cut
        same(read((await rig.http.post(path, json=asked)).content), wanted, noise=NOISE)
    return wanted, orders["cuts"] - before


async def test_every_kind_goes_on_exactly(mesh: Mesh) -> None:
    """Cut at six places, each kind of request gives what it gives undisturbed."""
    async with doors(mesh) as (rig, orders):
        for kind, (path, fields) in KINDS.items():
            began_s = time.monotonic()
            wanted, cuts = await check(rig, orders, path, request(path, fields))
            took_s = time.monotonic() - began_s
            print(f"{kind}: {cuts} cuts, {wanted.finish[0]}, {took_s:.1f} s")  # noqa: T201 - figures
            assert cuts >= 3, kind
            if kind in STOPPED:
                assert wanted.finish[0][0] == "stop", kind
                assert wanted.finish[0][1] in STOPPED[kind]
        print(f"{orders['bare']} of {orders['cuts']} cuts after ids without text")  # noqa: T201 - figures
        assert orders["bare"] >= 1, "no cut fell where text was held back"


async def test_cuts_within_characters(mesh: Mesh) -> None:
    """An answer of characters of two to four bytes goes on without a wrong or a leaked one."""
    async with doors(mesh) as (rig, orders):
        signs = "é東京🌊ßñ"
        found = await rig.http.post("/tokenize", json={"model": MODEL, "prompt": signs})
        allowed = sorted({*found.json()["tokens"]})
        for path in (CHAT, COMPLETIONS):
            for penalty in (1.0, 1.2):
                fields = {"allowed_token_ids": allowed, "repetition_penalty": penalty, **USAGE}
                bare = orders["bare"]
                wanted, cuts = await check(rig, orders, path, request(path, fields))
                bare = orders["bare"] - bare
                print(f"{path}: {cuts} cuts, {bare} within a character, of {wanted.text!r}")  # noqa: T201 - for the reader
                assert bare >= 1, "no cut fell within a character"
                assert PROMPT not in wanted.text
                assert cuts == len(CUTS)


async def test_sampled_streams_go_on(mesh: Mesh) -> None:
    """Without a seed another sample goes on: whole, of the right length, without our prompt."""
    async with doors(mesh) as (rig, orders):
        asked = request(CHAT, {"temperature": 1.0, **USAGE})
        for cut in (3, 9, 21):
            orders["cut_after"] = cut
            got = read((await rig.http.post(CHAT, json=asked)).content)
            assert (got.errors, got.done) == ([], True)
            assert got.usage["completion_tokens"] == TOKENS
            assert PROMPT not in got.text
