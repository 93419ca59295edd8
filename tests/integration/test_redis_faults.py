"""Every fault of one Redis server under a constant load: no request may fail, nothing may drift.

The mesh reaches its Redis through a link that can be slow, silent or lead elsewhere; the server
behind it is killed, emptied, frozen, filled up, demoted, or gets another password. All faults hit
one mesh, one after another: it has to survive them all.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final

import pytest
from redis.exceptions import OutOfMemoryError

from services.cli.auditing import look
from shared.registry import Registry
from tests.support.mesh import Mesh, sim_model, start, write_models
from tests.support.redis_link import Link
from tests.support.redis_topologies import Server
from tests.support.redis_trial import Trial, under_load
from tests.support.streams import Load
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(240)]

MODEL: Final = "sim"
REPLICAS: Final = 3
PASSWORD: Final = "first-password"
FAULT_S: Final = 2.0
BACK_BOUND_S: Final = 4.0
"""From Redis' return until every proxy reserves in it again."""
FAILOVER_BOUND_S: Final = 2.0
REBUILT_BOUND_S: Final = 5.0
"""From the return of an empty Redis until it holds again what it held."""


class World:
    """A mesh, its Redis, and what lies between them."""

    def __init__(self, folder: Path) -> None:
        options = ("--appendonly", "yes", "--appendfsync", "everysec", "--masterauth", PASSWORD)
        self.primary = Server(folder / "a", *options, password=PASSWORD)
        self.spare = Server(folder / "b", *options, password=PASSWORD)
        self.link = Link(self.primary.port)
        self.replication = Link(self.primary.port)
        self.password_file = folder / "password"
        self.password_file.write_text(PASSWORD)

    def close(self) -> None:
        """End everything."""
        for link in (self.link, self.replication):
            link.__exit__()
        for server in (self.primary, self.spare):
            server.kill()

    def replicate(self) -> None:
        """Make the spare server an up-to-date replica, through a link of its own."""
        self.replication.heal()
        self.replication.lead_to(self.primary.port, cut=True)
        self.spare.follow(self.replication.port)

    def swap(self) -> None:
        """Call the spare the primary from now on."""
        self.primary, self.spare = self.spare, self.primary


async def off(act: Callable[..., object], *args: object) -> None:
    """Do something that blocks without holding up the load."""
    await asyncio.to_thread(act, *args)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    """Give the Redis of this file."""
    made = World(tmp_path_factory.mktemp("redis"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def mesh(world: World, tmp_path_factory: pytest.TempPathFactory) -> Generator[Mesh]:
    """Run one mesh for all the faults of this file."""
    models = write_models(
        tmp_path_factory.mktemp("models") / "models.json",
        sim_model(MODEL, replicas=REPLICAS, step_ms=20),
    )
    env = {
        "REDMESH_REDIS_URL": world.link.url(),
        "REDMESH_REDIS_PASSWORD_FILE": str(world.password_file),
    }
    with start(models, env=env) as running:
        yield running


async def test_scripts_are_flushed(world: World, mesh: Mesh) -> None:
    """SCRIPT FLUSH again and again costs a reload each time, and nobody notices."""
    async with under_load(mesh, MODEL, "scripts flushed") as trial:
        for _ in range(20):
            await off(world.primary.command, "SCRIPT", "FLUSH")
            await trial.served(5)
        await trial.is_back()
        await trial.heals()


async def test_restart_with_data(world: World, mesh: Mesh) -> None:
    """Redis is killed and comes back with its data: as after a pause."""
    async with under_load(mesh, MODEL, "restart with data") as trial:
        await off(world.primary.kill)
        await trial.goes_away()
        await trial.lasts(FAULT_S)
        await off(world.primary.start)
        await trial.is_back()
        await trial.heals(ledger_bound_s=BACK_BOUND_S)


async def test_restart_empty(world: World, mesh: Mesh) -> None:
    """Redis comes back empty: deployments, records, orders and reservations are all made anew."""
    long = Load(mesh.ports, MODEL, max_tokens=250)
    async with under_load(mesh, MODEL, "restart empty") as trial, long.users(6, over_s=0.1):
        await wait_until(lambda: long.streaming == 6, what="long streams run")
        async with mesh.registry() as registry:
            declared = (await registry.fleet.deployments())[MODEL]
            held = {request for request, _ in await accounts(registry)}
        await off(world.primary.kill)
        await trial.goes_away()
        await off(world.primary.forget)
        await off(world.primary.start)
        await trial.is_back()
        async with mesh.registry() as registry:

            async def adopted() -> bool:
                old = [leased for request, leased in await accounts(registry) if request in held]
                return len(old) >= 6 and all(old)

            await trial.within(BACK_BOUND_S, "running streams reserved again", adopted)
        await rebuilt(mesh, trial)
        await trial.heals()
        async with mesh.registry() as registry:
            assert (await registry.fleet.deployments())[MODEL] == declared
    assert not long.report().failures, long.report()


async def accounts(registry: Registry) -> list[tuple[str, bool]]:
    """Give every live request of every proxy, and whether the ledger has its reservation."""
    sample = (await look(registry, None)).get(MODEL)
    if sample is None:
        return []
    return [
        (request, request in sample.leases.get(proxy, {}))
        for proxy, live in sample.live.items()
        for request in live or {}
    ]


async def test_everything_is_deleted_at_once(world: World, mesh: Mesh) -> None:
    """FLUSHALL with nobody's connection cut is a loss of data like any other."""
    async with under_load(mesh, MODEL, "flushed") as trial:
        await off(world.primary.command, "FLUSHALL")
        await trial.is_back()
        await rebuilt(mesh, trial)
        await trial.heals()


async def rebuilt(mesh: Mesh, trial: Trial) -> None:
    """Wait until the registry says again what it said before the loss."""
    async with mesh.registry() as registry:

        async def deployed() -> bool:
            return MODEL in await registry.fleet.deployments()

        async def recorded() -> bool:
            snapshot = await registry.replicas.snapshot(MODEL)
            return snapshot.authoritative and set(snapshot.replicas) == set(trial.before)

        async def ordered() -> bool:
            orders = await registry.fleet.orders(next(iter(trial.before.values())).host)
            return set(orders) == set(trial.before)

        await trial.within(REBUILT_BOUND_S, "declared again", deployed)
        await trial.within(REBUILT_BOUND_S, "recorded again", recorded)
        await trial.within(REBUILT_BOUND_S, "ordered again", ordered)


async def test_failover_to_a_lagging_replica(world: World, mesh: Mesh) -> None:
    """The last seconds of writes are lost with the primary: the ledger is exact again at once."""
    await off(world.replicate)
    await wait_until(lambda: asyncio.to_thread(world.spare.synced), what="the replica has the data")
    async with under_load(mesh, MODEL, "failover to a lagging replica") as trial:
        await off(world.replication.blackhole)
        await trial.served(60)
        await off(world.primary.kill)
        await trial.goes_away()
        await off(world.spare.follow, None)
        await off(lambda: world.link.lead_to(world.spare.port, cut=True))
        world.swap()
        await trial.is_back(world.primary)
        await trial.heals(ledger_bound_s=FAILOVER_BOUND_S)
    await off(world.spare.forget)
    await off(world.spare.start)


async def test_planned_failover_leaves_the_old_primary_as_a_replica(
    world: World, mesh: Mesh
) -> None:
    """The sockets to the old primary stay open and answer READONLY: the next call gives them up.

    Proxies reserve all the time and leave at once; who asks once a second leaves within a second.
    """
    await off(world.replicate)
    await wait_until(lambda: asyncio.to_thread(world.spare.synced), what="the replica has the data")
    async with under_load(mesh, MODEL, "planned failover") as trial:
        await off(world.spare.follow, None)
        await off(lambda: world.link.lead_to(world.spare.port, cut=False))
        await off(world.primary.follow, world.spare.port)
        world.swap()
        old = world.spare

        async def deserted() -> bool:
            # Only a subscription to the routes may still be there until its next PING finds out.
            clients = await asyncio.to_thread(old.command, "CLIENT", "LIST", "TYPE", "NORMAL")
            return clients.count(b"cmd=evalsha") == 0

        await trial.is_back(world.primary)
        await asyncio.gather(
            trial.heals(ledger_bound_s=FAILOVER_BOUND_S),
            trial.within(FAILOVER_BOUND_S, "nobody at the old primary", deserted),
        )


async def test_memory_is_full(world: World, mesh: Mesh) -> None:
    """`maxmemory` with `noeviction` is reached: plain writes are refused, and traffic is not.

    Redis lets a script finish that has begun to write, and each of ours begins with a write.
    """
    async with under_load(mesh, MODEL, "memory full") as trial:
        await off(world.primary.command, "CONFIG", "SET", "maxmemory", "1mb")
        with pytest.raises(OutOfMemoryError):
            await off(world.primary.command, "SET", "redmesh:test", "x")
        await trial.served(100)
        await off(world.primary.command, "CONFIG", "SET", "maxmemory", "0")
        await trial.is_back()
        await trial.heals()


async def test_disk_is_full(world: World, mesh: Mesh) -> None:
    """The append-only file cannot grow: Redis refuses writes, and recovers by itself."""
    async with under_load(mesh, MODEL, "disk full") as trial:
        await off(lambda: world.primary.fill_disk(full=True))
        await trial.goes_away()
        await trial.lasts(FAULT_S)
        await off(lambda: world.primary.fill_disk(full=False))
        await trial.is_back()
        await trial.heals(ledger_bound_s=BACK_BOUND_S)


async def test_password_is_rotated(world: World, mesh: Mesh) -> None:
    """The server has a new password and has cut everybody: the file's new content opens it."""
    async with under_load(mesh, MODEL, "password rotated") as trial:
        await rotate(world, "second-password")
        await off(world.primary.command, "CLIENT", "KILL", "TYPE", "normal")
        await trial.goes_away()
        await trial.lasts(FAULT_S)
        world.password_file.write_text("second-password\n")
        await trial.is_back()
        await trial.heals(ledger_bound_s=BACK_BOUND_S)
        # The other way round is how it is done: nobody is cut, and nothing happens.
        await rotate(world, PASSWORD)
        world.password_file.write_text(PASSWORD)


async def rotate(world: World, password: str) -> None:
    """Give Redis another password, for connections to come."""
    await off(world.primary.command, "CONFIG", "SET", "requirepass", password)
    world.primary.password = password


async def test_frozen(world: World, mesh: Mesh) -> None:
    """SIGSTOP leaves every connection half open; thawed, Redis does late what it was asked."""
    async with under_load(mesh, MODEL, "frozen") as trial:
        os.kill(world.primary.pid, signal.SIGSTOP)
        try:
            await trial.goes_away()
            await trial.lasts(FAULT_S)
        finally:
            os.kill(world.primary.pid, signal.SIGCONT)
        await trial.is_back()
        await trial.heals(ledger_bound_s=BACK_BOUND_S)


@pytest.mark.parametrize("kind", ["blackhole", "mute"])
async def test_silent(world: World, mesh: Mesh, kind: str) -> None:
    """Connections that look open carry nothing, or only commands: no request waits for them."""
    async with under_load(mesh, MODEL, kind) as trial:
        await off(world.link.blackhole if kind == "blackhole" else world.link.mute)
        await trial.goes_away()
        await trial.lasts(FAULT_S)
        await off(world.link.heal)
        await trial.is_back()
        await trial.heals(ledger_bound_s=BACK_BOUND_S)


async def test_slow(world: World, mesh: Mesh) -> None:
    """200 ms for each answer are worse than none: nobody waits for them."""
    async with under_load(mesh, MODEL, "200 ms") as trial:
        await off(world.link.slow, 0.1)
        await trial.goes_away()
        await trial.lasts(FAULT_S)
        await off(world.link.slow, 0.0)
        await trial.is_back()
        await trial.heals(ledger_bound_s=BACK_BOUND_S)
