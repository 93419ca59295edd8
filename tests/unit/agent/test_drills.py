"""Drills through an agent: taken once, for one incarnation, and never for good."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator

import psutil
import pytest

from services.agent.drills import DONE, REFUSED, Drills
from services.agent.reconcile import EngineView, Phase
from shared.clock import SystemClock
from shared.lifecycle import Loops
from shared.models.deployment import EngineKind
from shared.models.drill import DrillAct, DrillWish
from shared.registry import Registry, open_registry
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

HOST = "h1"


@pytest.fixture
async def registry(redis_server: RedisServer, key_prefix: str) -> AsyncGenerator[Registry]:
    """Open a registry of its own."""
    settings = CommonSettings(redis_url=Secret(redis_server.url), key_prefix=key_prefix)
    made = await open_registry(settings)
    yield made
    await made.aclose()


@pytest.fixture
def engine() -> Generator["subprocess.Popen[bytes]"]:
    """Run something that stands for an engine, in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    )
    yield process
    process.kill()
    process.wait(10)


def view(pid: int, *, gen: int = 3, phase: Phase = Phase.READY) -> dict[str, EngineView]:
    """Show the engine as its agent does."""
    kind = EngineKind.SIM
    return {"r": EngineView(rid="r", model="m", gen=gen, kind=kind, phase=phase, pid=pid)}


def wish(act: DrillAct, hold_s: float = 30.0) -> DrillWish:
    """Wish something for incarnation 3 of the replica."""
    return DrillWish(id="d1", rid="r", gen=3, act=act, hold_s=hold_s, by="op")


async def answer(registry: Registry) -> str:
    """Tell how the agent answered."""
    events = await registry.fleet.events(1)
    assert events[-1].subject == "drill/d1"
    return events[-1].kind


def stopped(pid: int) -> bool:
    """Tell whether the process is frozen."""
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


async def test_a_wish_is_carried_out_once(
    registry: Registry, engine: "subprocess.Popen[bytes]"
) -> None:
    """The engine is killed, an event says so, and nothing of the wish is left."""
    drills = Drills(SystemClock(), HOST)
    assert await registry.drills.wish(HOST, wish(DrillAct.KILL))
    assert not await registry.drills.wish(HOST, wish(DrillAct.KILL)), "one at a time"
    await drills.look(registry, view(engine.pid))
    assert await answer(registry) == DONE
    assert await asyncio.to_thread(engine.wait, 10) == -signal.SIGKILL
    assert await registry.drills.take(HOST) is None


@pytest.mark.parametrize(
    "engines",
    [{}, view(os.getpid(), gen=4), view(os.getpid(), phase=Phase.ENDED), view(0)],
    ids=["unknown", "later incarnation", "ended", "no process"],
)
async def test_only_the_very_engine_is_struck(
    registry: Registry, engines: dict[str, EngineView]
) -> None:
    """A wish for something else than what runs is refused; the test itself would be killed."""
    await registry.drills.wish(HOST, wish(DrillAct.KILL))
    await Drills(SystemClock(), HOST).look(registry, engines)
    assert await answer(registry) == REFUSED


async def test_a_wish_that_nobody_takes_vanishes(registry: Registry) -> None:
    """A wish has a time to live, so that it is never carried out late."""
    await registry.drills.wish(HOST, wish(DrillAct.KILL))
    key = registry.keys.fleet.drill(HOST)
    assert 0 < await registry.connection.command("PTTL", key) <= 5000
    await registry.connection.command("SET", key, "{not a wish", "PX", 1000)
    assert await registry.drills.take(HOST) is None


async def test_what_is_frozen_is_thawed(
    registry: Registry, engine: "subprocess.Popen[bytes]"
) -> None:
    """When its time is over, when it is wished, and when the agent ends."""
    engines = view(engine.pid)
    for hold_s, ending in ((0.4, "time"), (30.0, "wish"), (30.0, "end")):
        async with Loops() as loops:
            drills = Drills(SystemClock(), HOST)
            loops.start("drills", drills.run(lambda: registry, lambda: engines))
            await registry.drills.wish(HOST, wish(DrillAct.FREEZE, hold_s))
            await wait_until(lambda: stopped(engine.pid), what="frozen")
            if ending == "wish":
                assert await registry.drills.wish(HOST, wish(DrillAct.THAW))
            if ending != "end":
                await wait_until(lambda: not stopped(engine.pid), what=f"thawed by {ending}")
        await wait_until(lambda: not stopped(engine.pid), what=f"thawed by {ending}")
