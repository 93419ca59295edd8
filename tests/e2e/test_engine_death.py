"""Real engines die: by the API process or by the engine's core behind it."""

import os
import signal

import psutil
import pytest

from shared.models.replica import Replica
from tests.support.mesh import Mesh, ready_replicas
from tests.support.streams import Load
from tests.support.verdicts import Outcome
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.mesh, pytest.mark.timeout(420)]

USERS = 4


@pytest.mark.parametrize("core", [False, True], ids=["api-process", "engine-core"])
async def test_a_killed_engine_is_replaced_and_traffic_goes_on(mesh: Mesh, core: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """No request is lost before its first byte, the rest of the engine goes, a new one comes."""
    async with mesh.registry() as registry:
        before = await ready_replicas(registry, "demo")
        victim = next(iter(before.values()))
        tree = psutil.Process(victim.pid).children(recursive=True)
        load = Load(mesh.ports, "demo", max_tokens=100)
        async with load.users(USERS):
            await wait_until(lambda: load.good >= 2 * USERS, timeout_s=30, what="traffic flows")
            os.kill(_core(tree) if core else victim.pid, signal.SIGKILL)

            async def out() -> bool:
                return victim.rid not in await ready_replicas(registry, "demo")

            # The core's death shows when the API process has noticed it and ends.
            await wait_until(out, timeout_s=4.0 if core else 1.0, what="out of routing")
            aim = load.good + 5 * USERS
            await wait_until(lambda: load.good >= aim, timeout_s=30, what="traffic goes on")

            async def replaced() -> bool:
                return len(await _others(mesh, victim)) == len(before)

            await wait_until(replaced, timeout_s=150, interval_s=0.2, what="replaced")
        report = load.report()
        print(f"\n{report}")  # noqa: T201 - figures for the reader
        assert report.lost == 0
        assert set(report.broken) <= {Outcome.ERROR_EVENT}
        assert sum(report.broken.values()) <= USERS
        await wait_until(
            lambda: not any(process.is_running() for process in tree),
            timeout_s=30,
            what="nothing of the killed engine runs any more",
        )
        audit = await mesh.ask("audit")
        assert audit.code == 0, audit


def _core(tree: list[psutil.Process]) -> int:
    (pid,) = (each.pid for each in tree if "EngineCore" in " ".join([each.name(), *each.cmdline()]))
    return pid


async def _others(mesh: Mesh, victim: Replica) -> dict[str, Replica]:
    async with mesh.registry() as registry:
        ready = await ready_replicas(registry, "demo")
    return {rid: replica for rid, replica in ready.items() if rid != victim.rid}
