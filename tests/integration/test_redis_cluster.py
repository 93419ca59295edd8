"""A mesh on a Redis Cluster, whose slots move and whose primaries die.

The promise is that of one server: no request fails, and soon after a new primary answers the mesh
uses it and its accounts agree.
"""

import asyncio
from collections.abc import Generator
from typing import Final

import pytest

from shared.registry.keys import Keys
from tests.support.mesh import Mesh, sim_model, start, write_models
from tests.support.redis_topologies import Cluster
from tests.support.redis_trial import under_load
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(240)]

MODEL: Final = "sim"
FAILOVER_BOUND_S: Final = 2.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Generator[Cluster]:
    """Give a cluster of three primaries with their replicas."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.kill()


@pytest.fixture(scope="module")
def mesh(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Generator[Mesh]:
    """Run a mesh on the cluster."""
    models = write_models(
        tmp_path_factory.mktemp("models") / "models.json",
        sim_model(MODEL, replicas=2, step_ms=20),
    )
    with start(models, env={"REDMESH_REDIS_URL": cluster.url}) as running:
        yield running


@pytest.mark.parametrize("what", ["model", "fleet"])
async def test_a_slot_of_the_cluster_moves(cluster: Cluster, mesh: Mesh, what: str) -> None:
    """Keys go to another node one by one while they are used; then a MOVED tells where they are."""
    keys = Keys()
    slot = cluster.slot_of(keys.model(MODEL).spec if what == "model" else keys.fleet.leader)
    owner = await asyncio.to_thread(cluster.owner, slot)
    leading = await asyncio.to_thread(cluster.primaries)
    target = next(number for number in leading if number != owner)
    async with under_load(mesh, MODEL, f"slot of the {what} moved") as trial:
        moved = await asyncio.to_thread(cluster.move, slot, target)
        assert moved > 0
        await trial.is_back()
        await trial.heals(ledger_bound_s=FAILOVER_BOUND_S)
        assert await asyncio.to_thread(cluster.owner, slot) == target


async def test_the_cluster_replaces_the_models_primary(cluster: Cluster, mesh: Mesh) -> None:
    """The node with the model's keys is killed: its replica takes over, and the mesh follows."""
    slot = cluster.slot_of(Keys().model(MODEL).spec)
    number = await asyncio.to_thread(cluster.owner, slot)
    async with under_load(mesh, MODEL, "cluster, primary killed") as trial:
        await asyncio.to_thread(cluster.nodes[number].kill)
        await trial.goes_away()

        def taken_over() -> bool:
            owner = cluster.owner(slot)
            return owner not in {-1, number} and cluster.nodes[owner].leads()

        await wait_until(
            lambda: asyncio.to_thread(taken_over), timeout_s=30, what="a replica has the slot"
        )
        await trial.is_back()
        await trial.heals(ledger_bound_s=FAILOVER_BOUND_S)
    # Other tests may come after this one, and find all the nodes.
    await asyncio.to_thread(cluster.nodes[number].start)
    await wait_until(
        lambda: asyncio.to_thread(cluster.nodes[number].synced),
        timeout_s=30,
        what="the dead one is a replica",
    )
