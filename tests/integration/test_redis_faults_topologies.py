"""A mesh on Sentinels, and one on a Redis Cluster, whose primaries die, move and change places.

The promise is that of one server: no request fails, and soon after a new primary answers the mesh
uses it and its accounts agree.
"""

import asyncio
import contextlib
from collections.abc import Generator
from typing import Final

import pytest
import redis

from shared.registry.keys import Keys
from tests.support.mesh import Mesh, sim_model, start, write_models
from tests.support.redis_topologies import SERVICE, Cluster, Sentinels, Server
from tests.support.redis_trial import under_load
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.mesh, pytest.mark.alone, pytest.mark.timeout(240)]

MODEL: Final = "sim"
FAILOVER_BOUND_S: Final = 2.0


@pytest.fixture(scope="module")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Generator[Sentinels]:
    """Give a primary, its replica and three Sentinels."""
    made = Sentinels(tmp_path_factory.mktemp("sentinels"))
    yield made
    made.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Generator[Cluster]:
    """Give a cluster of three primaries with their replicas."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.kill()


@pytest.fixture(scope="module")
def watched(sentinels: Sentinels, tmp_path_factory: pytest.TempPathFactory) -> Generator[Mesh]:
    """Run a mesh on the Sentinels."""
    with on(sentinels.url, tmp_path_factory) as running:
        yield running


@pytest.fixture(scope="module")
def clustered(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Generator[Mesh]:
    """Run a mesh on the cluster."""
    with on(cluster.url, tmp_path_factory) as running:
        yield running


@contextlib.contextmanager
def on(url: str, folders: pytest.TempPathFactory) -> Generator[Mesh]:
    """Run a mesh on a Redis."""
    models = write_models(
        folders.mktemp("models") / "models.json", sim_model(MODEL, replicas=2, step_ms=20)
    )
    with start(models, env={"REDMESH_REDIS_URL": url}) as running:
        yield running


async def leads(server: Server) -> bool:
    """Tell whether a server answers as a primary."""
    try:
        role = await asyncio.to_thread(server.command, "ROLE")
    except redis.RedisError:
        return False
    return role[0] == b"master"


async def named(sentinels: Sentinels, server: Server) -> bool:
    """Tell whether the Sentinels name a server as the primary, and it is one."""
    return await leads(server) and await asyncio.to_thread(sentinels.agree, server)


async def test_sentinels_swap_the_primary_on_demand(sentinels: Sentinels, watched: Mesh) -> None:
    """`SENTINEL FAILOVER`: the old primary takes writes for ten seconds more, but none of ours."""
    old = await asyncio.to_thread(sentinels.primary)
    new = next(node for node in sentinels.nodes if node is not old)
    async with under_load(watched, MODEL, "SENTINEL FAILOVER") as trial:
        await asyncio.to_thread(sentinels.ask, 0, "SENTINEL", "FAILOVER", SERVICE)
        await wait_until(lambda: named(sentinels, new), timeout_s=20, what="the replica leads")
        await trial.is_back(new)
        await trial.heals(ledger_bound_s=FAILOVER_BOUND_S)
    await wait_until(lambda: asyncio.to_thread(old.synced), timeout_s=30, what="a replica again")


async def test_sentinels_replace_a_dead_primary(sentinels: Sentinels, watched: Mesh) -> None:
    """The primary is killed: seconds later the Sentinels have another, and the mesh uses it."""
    old = await asyncio.to_thread(sentinels.primary)
    new = next(node for node in sentinels.nodes if node is not old)
    async with under_load(watched, MODEL, "Sentinels, primary killed") as trial:
        await asyncio.to_thread(old.kill)
        await trial.goes_away()
        await wait_until(lambda: named(sentinels, new), timeout_s=30, what="the replica leads")
        await trial.is_back(new)
        await trial.heals(ledger_bound_s=FAILOVER_BOUND_S)


@pytest.mark.parametrize("what", ["model", "fleet"])
async def test_a_slot_of_the_cluster_moves(cluster: Cluster, clustered: Mesh, what: str) -> None:
    """Keys go to another node one by one while they are used; then a MOVED tells where they are."""
    keys = Keys()
    slot = cluster.slot_of(keys.model(MODEL).spec if what == "model" else keys.fleet.leader)
    target = (await asyncio.to_thread(cluster.owner, slot) + 1) % 3
    async with under_load(clustered, MODEL, f"slot of the {what} moved") as trial:
        moved = await asyncio.to_thread(cluster.move, slot, target)
        assert moved > 0
        await trial.is_back()
        await trial.heals(ledger_bound_s=FAILOVER_BOUND_S)
        assert await asyncio.to_thread(cluster.owner, slot) == target


async def test_the_cluster_replaces_the_models_primary(cluster: Cluster, clustered: Mesh) -> None:
    """The node with the model's keys is killed: its replica takes over, and the mesh follows."""
    slot = cluster.slot_of(Keys().model(MODEL).spec)
    number = await asyncio.to_thread(cluster.owner, slot)
    async with under_load(clustered, MODEL, "cluster, primary killed") as trial:
        await asyncio.to_thread(cluster.nodes[number].kill)
        await trial.goes_away()

        async def taken_over() -> bool:
            owner = await asyncio.to_thread(cluster.owner, slot)
            return owner not in {-1, number} and await leads(cluster.nodes[owner])

        await wait_until(taken_over, timeout_s=30, what="a replica has the slot")
        await trial.is_back()
        await trial.heals(ledger_bound_s=FAILOVER_BOUND_S)
