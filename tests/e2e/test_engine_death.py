"""Real engines die: by the API process or by the engine's core behind it."""

import os
import select
import signal
import time

import psutil
import pytest

from tests.support.mesh import Mesh, ready_replicas
from tests.support.streams import Load
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.mesh, pytest.mark.timeout(420)]

USERS = 4
TOKENS = 300


@pytest.mark.parametrize("core", [False, True], ids=["api-process", "engine-core"])
async def test_a_killed_engine_is_replaced_and_traffic_goes_on(mesh: Mesh, core: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """No request is lost, streams go on elsewhere, the rest of the engine goes, a new one comes."""
    async with mesh.registry() as registry:
        before = await ready_replicas(registry, "demo")
        assert len(before) == 2
        victim = next(iter(before.values()))
        tree = psutil.Process(victim.pid).children(recursive=True)
        load = Load(mesh.ports, "demo", max_tokens=TOKENS)

        async def busy() -> bool:
            totals = await registry.ledger.totals("demo")
            held = totals.get(victim.rid)
            return load.streaming == USERS and held is not None and held.requests > 0

        async def out() -> bool:
            return victim.rid not in await ready_replicas(registry, "demo")

        async with load.users(USERS):
            await wait_until(lambda: load.good >= USERS, timeout_s=60, what="traffic flows")
            await wait_until(busy, timeout_s=30, what="the victim is in the midst of streams")
            struck = _core(tree) if core else psutil.Process(victim.pid)
            ending = os.pidfd_open(struck.pid)
            started_s = time.monotonic()
            struck.send_signal(signal.SIGKILL)
            # An engine is dead when its last thread is: on starved cores the kernel was seen to
            # take 0.1 to 2.5 s for that, and only then its sockets close and its pidfd tells.
            await wait_until(lambda: _ended(ending), timeout_s=10, what="the process has ended")
            ended_s = time.monotonic()
            await wait_until(out, timeout_s=1.0, what="out of routing")
            out_s = time.monotonic()
            os.close(ending)
            print(  # noqa: T201 - figures for the reader
                f"\ndead {ended_s - started_s:.2f} s after SIGKILL, out of routing "
                f"{out_s - ended_s:.2f} s after its death"
            )
            aim = load.good + 2 * USERS
            await wait_until(lambda: load.good >= aim, timeout_s=60, what="traffic goes on")
        report = load.report()
        print(f"\n{report}")  # noqa: T201 - figures for the reader
        assert (report.ok, report.retried) == (report.count, 0)
        await wait_until(
            lambda: not any(process.is_running() for process in tree),
            timeout_s=30,
            what="nothing of the killed engine runs any more",
        )

        async def replaced() -> bool:
            return len(await ready_replicas(registry, "demo")) == len(before)

        await wait_until(replaced, timeout_s=150, interval_s=0.2, what="replaced")
        again = Load(mesh.ports, "demo", max_tokens=TOKENS)
        async with again.users(USERS):
            await wait_until(lambda: again.good >= 2 * USERS, timeout_s=60, what="traffic flows")
        assert again.report().ok == again.report().count, str(again.report())
        audit = await mesh.ask("audit")
        assert audit.code == 0, audit


def _core(tree: list[psutil.Process]) -> psutil.Process:
    (core,) = (each for each in tree if "EngineCore" in " ".join([each.name(), *each.cmdline()]))
    return core


def _ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])
