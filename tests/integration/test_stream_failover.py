"""Five hundred streams outlive the replicas that write them, again and again.

They are of every kind that goes on exactly: greedy ones, some that end at a stop string which no
event has to itself, some with log probabilities, sampled ones with a seed, and completions.
"""

import asyncio
import functools
import os
import re
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import pytest

from shared.registry import Registry
from tests.support.mesh import Mesh, ready_replicas, sim_model, start, write_models
from tests.support.streams import Load
from tests.support.verdicts import Asked, told
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.mesh, pytest.mark.alone, pytest.mark.timeout(300)]

MODEL: Final = "sturdy"
REPLICAS: Final = 4
USERS: Final = 500
TOKENS: Final = 40
STORM_S: Final = float(os.environ.get("STORM_S", "60"))
LONGEST_STORM_S: Final = 2 * STORM_S
"""A killed replica must be back before the next one is killed; a slow machine needs longer."""
KILLS: Final = round(STORM_S / 10)
CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
JSON: Final = {"content-type": "application/json"}
KINDS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    (CHAT, {}),
    (CHAT, {"stop": []}),
    (CHAT, {"logprobs": True, "top_logprobs": 2}),
    (CHAT, {"temperature": 0.8, "seed": 7}),
    (COMPLETIONS, {"logprobs": 1}),
)
"""A user's kind is its number modulo these. Stop strings are found before the storm."""
GONE_ON: Final = re.compile(
    r'^redmesh_proxy_stream_failovers_total\{[^}]*outcome="exact"[^}]*\} (\S+)', re.MULTILINE
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Generator[Mesh]:
    """Serve streams that take four seconds each."""
    folder: Path = tmp_path_factory.mktemp("models")
    models = write_models(folder / "models.json", sim_model(MODEL, replicas=REPLICAS, step_ms=100))
    with start(models, engine="sim") as mesh:
        yield mesh


def asked(user: int, stops: dict[int, str]) -> Asked:
    """Say what a user asks for; with a stop string if one is known for it."""
    path, fields = KINDS[user % len(KINDS)]
    question = f"User {user} asks für 東京 🚀: what is a mesh?"
    prompt = (
        {"messages": [{"role": "user", "content": question}]}
        if path == CHAT
        else {"prompt": question}
    )
    usual = {
        "model": MODEL,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    stop = {"stop": [stops[user], "never said"]} if user in stops else {}
    body = msgspec.json.encode({**usual, **prompt, **fields, **stop})
    if stop:
        return Asked(body=body, path=path, finish="stop", tokens=None)
    return Asked(body=body, path=path, tokens=TOKENS)


async def stop_strings(mesh: Mesh) -> dict[int, str]:
    """Find for each user who wants one a string of its answer that begins and ends within words."""
    found: dict[int, str] = {}
    async with httpx.AsyncClient(timeout=60) as http:

        async def find(user: int) -> None:
            first = asked(user, {})
            url = mesh.urls[user % len(mesh.urls)] + first.path
            answer = await http.post(url, content=first.body, headers=JSON)
            assert answer.status_code == 200, answer.text
            text = told(answer.content).text
            # Anywhere in the answer, so that some streams are cut before it and some within it.
            at = 20 + user % (len(text) - 40)
            found[user] = text[at : at + 9]

        async with asyncio.TaskGroup() as group:
            for user in range(USERS):
                if "stop" in KINDS[user % len(KINDS)][1]:
                    group.create_task(find(user))
    return found


async def test_five_hundred_streams_outlive_their_replicas(running: Mesh) -> None:
    """A replica is killed as soon as all are back; every stream is whole and as undisturbed."""
    asks = functools.partial(asked, stops=await stop_strings(running))
    load = Load(running.ports, MODEL, max_tokens=TOKENS, timeout_s=90, asks=asks)
    kills = 0
    async with running.registry() as registry, load.users(USERS, over_s=4.0):
        # Each user's first answer, undisturbed, is what all its later ones are compared with.
        await wait_until(lambda: load.good >= 2 * USERS, timeout_s=90, what="all have an answer")
        assert load.report().ok == load.report().count, str(load.report())
        began_s = time.monotonic()
        while (past_s := time.monotonic() - began_s) < STORM_S or (
            kills < KILLS and past_s < LONGEST_STORM_S
        ):
            ready = await ready_replicas(registry, MODEL)
            if len(ready) < REPLICAS:
                await asyncio.sleep(0.1)
                continue
            os.kill(next(iter(ready.values())).pid, signal.SIGKILL)
            kills += 1
            await wait_until(lambda: _fewer(registry), timeout_s=5, what="out of routing")
    report = load.report()
    gone_on = await _gone_on(running)
    print(f"\n{kills} replicas killed, {gone_on} times a stream went on: {report}")  # noqa: T201 - figures for the reader
    assert kills >= KILLS
    assert (report.ok, report.retried) == (report.count, 0), str(report)
    assert gone_on >= kills * USERS / REPLICAS / 10, "the kills hit hardly a stream"
    audit = await running.ask("audit")
    assert audit.code == 0, audit


async def _gone_on(mesh: Mesh) -> int:
    """Count over all proxies how often a stream went on exactly."""
    total = 0.0
    async with httpx.AsyncClient(timeout=20) as http:
        for url in mesh.urls:
            for line in GONE_ON.findall((await http.get(f"{url}/metrics")).text):
                total += float(line)
    return round(total)


async def _fewer(registry: Registry) -> bool:
    return len(await ready_replicas(registry, MODEL)) < REPLICAS
