"""Routing tables: converge by hints and snapshots, and never empty themselves."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import msgspec
import pytest

from services.proxy.convergence import Convergence
from services.proxy.table import VANISHED_S, Tables, choose_least_own
from services.proxy.tablefile import TableFile
from shared.errors import CorruptRecordError, RegistryUnavailableError
from shared.lifecycle import Loops
from shared.models.deployment import Deployment
from shared.models.replica import Replica, ReplicaState
from shared.models.routing import Snapshot
from shared.registry.ledger import BUSY, NONE
from shared.registry.routes import RouteHint, RoutesReset
from tests.support.waiting import wait_until
from tests.unit.proxy.rig import MODEL, deployment, replica, snapshot

A = replica("a", "http://a:1")
B = replica("b", "http://b:1")


def tables_with(*replicas: Replica, ver: int = 10) -> Tables:
    """Make tables that hold one model."""
    tables = Tables()
    assert tables.apply_catalogue({MODEL: deployment()}, 0.0) == [MODEL]
    assert tables.apply_snapshot(snapshot(replicas, ver))
    return tables


def test_names_and_aliases() -> None:
    """A model is found by name and alias; a name wins over another model's alias."""
    tables = tables_with(A)
    found = tables.resolve("org/Demo-1B")
    assert found is tables.resolve(MODEL)
    both = {MODEL: deployment(), "org/Demo-1B": deployment("org/Demo-1B")}
    tables.apply_catalogue(both, 0.0)
    other = tables.resolve("org/Demo-1B")
    assert other is not None
    assert other.model == "org/Demo-1B"


def test_hint_in_order_is_applied() -> None:
    """A hint that follows on the table's version changes it at once."""
    tables = tables_with(A)
    changed: list[str] = []
    tables.on_change(lambda table: changed.append(table.model))
    assert tables.apply_hint(MODEL, 10, 11, "b", B)
    table = tables.get(MODEL)
    assert table is not None
    assert (table.ver, sorted(table.ready), changed) == (11, ["a", "b"], [MODEL])
    assert tables.apply_hint(MODEL, 11, 12, "a", None)
    assert list(table.ready) == ["b"]
    assert tables.apply_hint(MODEL, 11, 12, "a", None)  # seen already
    assert list(table.ready) == ["b"]


@pytest.mark.parametrize(("prev", "rid"), [(9, "b"), (12, "b"), (10, "*")])
def test_hint_out_of_order_asks_for_the_snapshot(prev: int, rid: str) -> None:
    """A gap, or a hint that says everything changed, changes nothing and asks for a read."""
    tables = tables_with(A)
    assert not tables.apply_hint(MODEL, prev, 13, rid, B)
    table = tables.get(MODEL)
    assert table is not None
    assert (table.ver, list(table.ready)) == (10, ["a"])


def test_snapshot_without_authority_is_not_taken() -> None:
    """A snapshot that no leader stands behind leaves the table as it is, and is not read again."""
    tables = tables_with(A)
    assert not tables.apply_snapshot(snapshot([], 3, epoch=None))
    table = tables.get(MODEL)
    assert table is not None
    assert list(table.ready) == ["a"]
    assert table.knows(3)


def test_lost_catalogue_keeps_the_models() -> None:
    """An empty catalogue where models were is lost data; a deletion that was announced is not."""
    tables = tables_with(A)
    tables.apply_catalogue({}, 0.0)
    assert tables.resolve(MODEL) is not None
    tables.apply_catalogue({MODEL: deployment(deleted=True)}, 0.0)
    assert tables.resolve(MODEL) is None
    tables.apply_catalogue({}, 0.0)
    assert len(tables) == 0


def test_a_model_that_vanishes_among_others_is_kept_for_a_while() -> None:
    """It may be lost data that somebody declares again; after that while it is gone."""
    tables = tables_with(A)
    both = {MODEL: deployment(), "other": deployment("other")}
    other = {"other": deployment("other")}
    tables.apply_catalogue(both, 0.0)
    tables.apply_catalogue(other, 100.0)
    tables.apply_catalogue(other, 100.0 + VANISHED_S - 0.1)
    assert tables.resolve(MODEL) is not None
    tables.apply_catalogue(both, 120.0)
    tables.apply_catalogue(other, 121.0)
    tables.apply_catalogue(other, 121.0 + VANISHED_S - 0.1)
    assert tables.resolve(MODEL) is not None
    tables.apply_catalogue(other, 121.0 + VANISHED_S)
    assert tables.resolve(MODEL) is None


def test_only_ready_replicas_with_an_address_count() -> None:
    """Replicas in any other state get nothing."""
    others = [
        replica(state.value.lower(), "http://x:1", state=state)
        for state in ReplicaState
        if state is not ReplicaState.READY
    ]
    table = tables_with(A, replica("c", ""), *others).get(MODEL)
    assert table is not None
    assert list(table.ready) == ["a"]


def test_least_own() -> None:
    """Without the ledger, the replica with the fewest own requests per capacity is chosen."""
    ready = {"a": A, "b": msgspec.structs.replace(B, capacity=2.0)}
    source = random.Random(1)
    assert choose_least_own(ready, {"a": 2, "b": 3}, (), source) == "b"
    assert choose_least_own(ready, {"a": 1, "b": 3}, (), source) == "a"
    assert choose_least_own(ready, {"a": 1}, ("b",), source) == "a"
    assert choose_least_own(ready, {}, ("a", "b"), source) == NONE
    assert choose_least_own({"a": A}, {"a": A.max_requests}, (), source) == BUSY
    equal = {"a": A, "b": B}
    assert {choose_least_own(equal, {}, (), source) for _ in range(50)} == {"a", "b"}


def test_copy_on_disk(tmp_path: Path) -> None:
    """A stored table serves after a restart, and gives way to the first word from Redis."""
    file = TableFile(tmp_path / "state")
    assert file.read() is None
    file.write(tables_with(A, ver=77).store())
    tables = Tables()
    content = file.read()
    assert content is not None
    tables.restore(content)
    table = tables.resolve("org/Demo-1B")
    assert table is not None
    assert (list(table.ready), table.authoritative, tables.catalogued) == (["a"], True, True)
    assert not table.knows(77)
    with pytest.raises(msgspec.DecodeError):
        Tables().restore(b'{"demo": {"ver"')


class World:
    """A registry to read tables from, in memory."""

    def __init__(self) -> None:
        self.models: dict[str, Deployment] = {MODEL: deployment()}
        self.current = snapshot([A], 10)
        self.reads = 0
        self.error: Exception | None = None
        self.queue: asyncio.Queue[RouteHint | RoutesReset] = asyncio.Queue()

    async def deployments(self) -> Mapping[str, Deployment]:
        """Read the catalogue."""
        if self.error is not None:
            raise self.error
        return self.models

    async def snapshot(self, model: str) -> Snapshot:
        """Read a snapshot."""
        assert model == MODEL
        self.reads += 1
        if self.error is not None:
            raise self.error
        return self.current

    async def hints(self) -> AsyncIterator[RouteHint | RoutesReset]:
        """Yield what the test puts in."""
        while True:
            yield await self.queue.get()


def converging(world: World, file: TableFile | None = None) -> tuple[Tables, Convergence]:
    """Make tables that follow `world`."""
    tables = Tables()
    convergence = Convergence(
        tables=tables,
        catalogue=world,
        snapshots=world,
        hints=world,
        random=random.Random(1),
        table_file=file,
    )
    return tables, convergence


async def test_convergence(tmp_path: Path) -> None:
    """Hints are applied; a gap, a reset or a foreign version has the snapshot read once."""
    world = World()
    file = TableFile(tmp_path)
    tables, convergence = converging(world, file)
    async with Loops() as loops:
        loops.start("hints", convergence.run_hints())
        loops.start("catalogue", convergence.run_catalogue())
        loops.start("snapshots", convergence.run_snapshots())
        loops.start("copies", convergence.run_copies())
        await wait_until(lambda: tables.catalogued)
        table = tables.get(MODEL)
        assert table is not None
        assert (table.ver, world.reads) == (10, 1)
        world.queue.put_nowait(RouteHint(model=MODEL, prev=10, ver=11, rid="b", replica=B))
        await wait_until(lambda: table.ver == 11)
        assert world.reads == 1
        world.current = snapshot([B], 20)
        for _ in range(5):
            world.queue.put_nowait(RouteHint(model=MODEL, prev=18, ver=19, rid="a", replica=None))
        await wait_until(lambda: table.ver == 20)
        assert world.reads == 2
        world.current = snapshot([A, B], 21)
        world.queue.put_nowait(RoutesReset())
        await wait_until(lambda: table.ver == 21)
        await wait_until(lambda: b'"ver":21' in (file.read() or b""), timeout_s=5)


async def test_convergence_after_an_outage() -> None:
    """A read that fails is tried again; until then the table stays as it is."""
    world = World()
    tables, convergence = converging(world)
    async with Loops() as loops:
        loops.start("snapshots", convergence.run_snapshots())
        world.error = RegistryUnavailableError("away")
        catalogue = loops.start("catalogue", convergence.run_catalogue())
        await asyncio.sleep(0)
        assert not tables.catalogued
        world.error = None
        await wait_until(lambda: tables.catalogued)
        table = tables.get(MODEL)
        assert table is not None
        catalogue.cancel()
        world.error = RegistryUnavailableError("away")
        reads = world.reads
        convergence.refresh(MODEL)
        await wait_until(lambda: world.reads > reads)
        assert list(table.ready) == ["a"]
        world.error = None
        world.current = snapshot([A, B], 30)
        await wait_until(lambda: table.ver == 30)


@pytest.mark.timed
async def test_hint_of_an_unknown_model_reads_the_catalogue() -> None:
    """A hint for a model that is not in the catalogue has the catalogue read at once."""
    world = World()
    tables, convergence = converging(world)
    async with Loops() as loops:
        loops.start("hints", convergence.run_hints())
        loops.start("catalogue", convergence.run_catalogue())
        await wait_until(lambda: tables.catalogued)
        world.models = {}
        world.models = {MODEL: deployment(), "new": deployment("new")}
        world.current = snapshot([A], 10)
        world.queue.put_nowait(RouteHint(model="new", prev=0, ver=1, rid="x", replica=None))
        # The snapshot of the new model is of another model here; that it is asked for is enough.
        await wait_until(lambda: tables.get("new") is not None, timeout_s=1.2)


class HalfCorrupt(World):
    """A registry in which somebody else's data lies in a key of the first model."""

    async def snapshot(self, model: str) -> Snapshot:
        """Read a snapshot."""
        if model == "broken":
            raise CorruptRecordError("foreign data", key="replicas")
        return await super().snapshot(model)


async def test_foreign_data_of_one_model() -> None:
    """A model whose keys hold foreign data keeps no other from being served."""
    world = HalfCorrupt()
    world.models = {"broken": deployment("broken"), MODEL: deployment()}
    tables, convergence = converging(world)
    await convergence.read_catalogue()
    table = tables.get(MODEL)
    assert table is not None
    assert (list(table.ready), tables.catalogued) == (["a"], True)
