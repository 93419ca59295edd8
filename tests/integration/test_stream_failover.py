"""Five hundred streams outlive the replicas that write them, again and again."""

import asyncio
import os
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Final

import pytest

from shared.registry import Registry
from tests.support.mesh import Mesh, ready_replicas, sim_model, start, write_models
from tests.support.streams import Load
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.mesh, pytest.mark.load, pytest.mark.timeout(240)]

MODEL: Final = "sturdy"
REPLICAS: Final = 4
USERS: Final = 500
TOKENS: Final = 40
STORM_S: Final = float(os.environ.get("STORM_S", "30"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Generator[Mesh]:
    """Serve streams that take four seconds each."""
    folder: Path = tmp_path_factory.mktemp("models")
    models = write_models(folder / "models.json", sim_model(MODEL, replicas=REPLICAS, step_ms=100))
    with start(models, engine="sim") as mesh:
        yield mesh


async def test_five_hundred_streams_outlive_their_replicas(running: Mesh) -> None:
    """A replica is killed as soon as all are back; every stream is whole and as undisturbed."""
    load = Load(running.ports, MODEL, max_tokens=TOKENS, timeout_s=90)
    kills = 0
    async with running.registry() as registry, load.users(USERS, over_s=4.0):
        # Each user's first answer, undisturbed, is what all its later ones are compared with.
        await wait_until(lambda: load.good >= 2 * USERS, timeout_s=90, what="all have an answer")
        assert load.report().ok == load.report().count
        until_s = time.monotonic() + STORM_S
        while time.monotonic() < until_s:
            ready = await ready_replicas(registry, MODEL)
            if len(ready) < REPLICAS:
                await asyncio.sleep(0.1)
                continue
            os.kill(next(iter(ready.values())).pid, signal.SIGKILL)
            kills += 1
            await wait_until(lambda: _fewer(registry), timeout_s=5, what="out of routing")
    report = load.report()
    print(f"\n{kills} replicas killed: {report}")  # noqa: T201 - figures for the reader
    assert kills >= STORM_S / 15
    assert (report.ok, report.retried) == (report.count, 0), str(report)
    audit = await running.ask("audit")
    assert audit.code == 0, audit


async def _fewer(registry: Registry) -> bool:
    return len(await ready_replicas(registry, MODEL)) < REPLICAS
