"""A mesh on Sentinels, whose primary changes places with its replica, or dies.

The promise is that of one server: no request fails, and soon after a new primary answers the mesh
uses it and its accounts agree.
"""

import asyncio
from collections.abc import Generator
from typing import Final

import pytest

from tests.support.mesh import Mesh, sim_model, start, write_models
from tests.support.redis_topologies import Sentinels, Server
from tests.support.redis_trial import under_load
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(240)]

MODEL: Final = "sim"
FAILOVER_BOUND_S: Final = 2.0


@pytest.fixture(scope="module")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Generator[Sentinels]:
    """Give a primary, its replica and three Sentinels."""
    made = Sentinels(tmp_path_factory.mktemp("sentinels"))
    yield made
    made.kill()


@pytest.fixture(scope="module")
def mesh(sentinels: Sentinels, tmp_path_factory: pytest.TempPathFactory) -> Generator[Mesh]:
    """Run a mesh on the Sentinels."""
    models = write_models(
        tmp_path_factory.mktemp("models") / "models.json",
        sim_model(MODEL, replicas=2, step_ms=20),
    )
    with start(models, env={"REDMESH_REDIS_URL": sentinels.url}) as running:
        yield running


async def named(sentinels: Sentinels, server: Server) -> bool:
    """Tell whether the Sentinels name a server as the primary, and it is one."""
    return await asyncio.to_thread(lambda: server.leads() and sentinels.agree(server))


async def test_sentinels_swap_the_primary_on_demand(sentinels: Sentinels, mesh: Mesh) -> None:
    """`SENTINEL FAILOVER`: the old primary takes writes for ten seconds more, but none of ours."""
    old = await asyncio.to_thread(sentinels.primary)
    new = next(node for node in sentinels.nodes if node is not old)
    async with under_load(mesh, MODEL, "SENTINEL FAILOVER") as trial:
        await asyncio.to_thread(sentinels.fail_over)
        await wait_until(lambda: named(sentinels, new), timeout_s=20, what="the replica leads")
        await trial.is_back(new)
        await trial.heals(ledger_bound_s=FAILOVER_BOUND_S)
    await wait_until(lambda: asyncio.to_thread(old.synced), timeout_s=30, what="a replica again")


async def test_sentinels_replace_a_dead_primary(sentinels: Sentinels, mesh: Mesh) -> None:
    """The primary is killed: seconds later the Sentinels have another, and the mesh uses it."""
    old = await asyncio.to_thread(sentinels.primary)
    new = next(node for node in sentinels.nodes if node is not old)
    async with under_load(mesh, MODEL, "Sentinels, primary killed") as trial:
        await asyncio.to_thread(old.kill)
        await trial.goes_away()
        await wait_until(lambda: named(sentinels, new), timeout_s=30, what="the replica leads")
        await trial.is_back(new)
        await trial.heals(ledger_bound_s=FAILOVER_BOUND_S)
    # The other test may come after this one, and needs a replica too.
    await asyncio.to_thread(old.start)
    await wait_until(lambda: asyncio.to_thread(old.synced), timeout_s=30, what="a replica again")
