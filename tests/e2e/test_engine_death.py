"""Real engines die again and again, by the API process or by the core behind it."""

import asyncio
import os
import select
import signal
import time
from typing import Any, Final

import httpx
import psutil
import pytest

from shared.registry import Registry
from tests.support.answers import Answer, read, same
from tests.support.mesh import Mesh, ready_replicas
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.mesh, pytest.mark.timeout(600)]

CHAT: Final = "/v1/chat/completions"
TOKENS: Final = 200
"""More than any answer has."""
STREAMS: Final = 50
STORM_S: Final = 60.0
LONGEST_STORM_S: Final = 300.0
"""On a slow machine an engine takes a minute to come back, and can be killed again only then."""
KILLS: Final = 3
LIMITS: Final = httpx.Limits(max_connections=2 * STREAMS, keepalive_expiry=60)
"""Usually the pool closes what was idle for 5 s, without a lock, so perhaps under a request."""
OUT_S: Final = 1.0
"""From an engine's death until no proxy is told of it any more."""


class Killer:
    """Kills engines in turn by either process, and sees to it that they are out of routing."""

    def __init__(self, registry: Registry) -> None:
        self.kills = 0
        self._registry = registry
        self._trees: list[psutil.Process] = []

    async def strike(self) -> None:
        """Kill one of the engines that are READY and at work, if another is left."""
        ready = await ready_replicas(self._registry, "demo")
        totals = await self._registry.ledger.totals("demo")
        busy = [each for rid, each in ready.items() if rid in totals and totals[rid].requests > 0]
        if len(ready) < 2 or not busy:
            return
        victim = busy[0]
        tree = psutil.Process(victim.pid).children(recursive=True)
        by_core = self.kills % 2 == 1
        struck = _core(tree) if by_core else psutil.Process(victim.pid)
        self._trees += tree
        ending = os.pidfd_open(struck.pid)
        started_s = time.monotonic()
        struck.send_signal(signal.SIGKILL)
        self.kills += 1
        # An engine is dead when its last thread is: on starved cores the kernel was seen to
        # take 0.1 to 2.5 s for that, and only then its sockets close and its pidfd tells.
        await wait_until(lambda: _ended(ending), timeout_s=10, what="the process has ended")
        ended_s = time.monotonic()

        async def out() -> bool:
            return victim.rid not in await ready_replicas(self._registry, "demo")

        await wait_until(out, timeout_s=OUT_S, what="out of routing")
        os.close(ending)
        print(  # noqa: T201 - figures for the reader
            f"\n{'core' if by_core else 'API process'}: dead {ended_s - started_s:.2f} s after "
            f"SIGKILL, out of routing {time.monotonic() - ended_s:.2f} s after its death"
        )

    async def all_gone(self) -> None:
        """Wait until nothing of the killed engines runs any more."""
        await wait_until(
            lambda: not any(process.is_running() for process in self._trees),
            timeout_s=30,
            what="nothing of the killed engines runs any more",
        )


async def test_fifty_streams_outlive_their_engines(mesh: Mesh, faq: dict[str, str]) -> None:
    """Engines are killed for a minute; every stream ends as if nothing had happened.

    Each is out of routing at once, leaves nothing behind, and is replaced.

    What is asked for are the longest answers that the model knows by heart. Where it does not know
    what to say, two tokens can be as likely, and the engine's sums, which depend on how many other
    streams are computed together, decide: seen once, beyond an answer's end.
    """
    questions = sorted(faq, key=lambda question: -len(faq[question]))[:STREAMS]
    async with (
        mesh.registry() as registry,
        httpx.AsyncClient(timeout=180, limits=LIMITS) as client,
    ):

        async def ask(number: int) -> Answer:
            asked = {
                "model": "demo",
                "messages": [{"role": "user", "content": questions[number]}],
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_tokens": TOKENS,
                "temperature": 0,
            }
            url = f"{mesh.urls[number % len(mesh.urls)]}{CHAT}"
            return await _answer(client, url, asked)

        wanted = await asyncio.gather(*(ask(number) for number in range(STREAMS)))
        assert [answer.text for answer in wanted] == [faq[question] for question in questions]
        killer = Killer(registry)
        began_s = time.monotonic()
        done = 0

        def rages() -> bool:
            past_s = time.monotonic() - began_s
            return past_s < STORM_S or (killer.kills < KILLS and past_s < LONGEST_STORM_S)

        async def user(number: int) -> None:
            nonlocal done
            while rages():
                same(await ask(number), wanted[number])
                done += 1

        async def kill() -> None:
            while rages():
                await killer.strike()
                await asyncio.sleep(0.5)  # the pace of the kills

        async with asyncio.TaskGroup() as group:
            group.create_task(kill())
            for number in range(STREAMS):
                group.create_task(user(number))
        print(f"\n{done} streams whole and the same, {killer.kills} engines killed")  # noqa: T201 - figures
        assert killer.kills >= KILLS
        assert done >= STREAMS
        await killer.all_gone()

        async def restored() -> bool:
            return len(await ready_replicas(registry, "demo")) == 2

        await wait_until(restored, timeout_s=150, interval_s=0.2, what="replaced")
        again = await asyncio.gather(*(ask(number) for number in range(STREAMS)))
        for one, before in zip(again, wanted, strict=True):
            same(one, before)
    audit = await mesh.ask("audit")
    assert audit.code == 0, audit


async def _answer(client: httpx.AsyncClient, url: str, asked: dict[str, Any]) -> Answer:
    try:
        return read((await client.post(url, json=asked)).content)
    except httpx.TransportError as error:
        error.add_note(f"{url}: {error.__cause__ and error.__cause__.__context__!r}")
        raise


def _core(tree: list[psutil.Process]) -> psutil.Process:
    (core,) = (each for each in tree if "EngineCore" in " ".join([each.name(), *each.cmdline()]))
    return core


def _ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])
