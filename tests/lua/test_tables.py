"""A beat keeps what the ledger looks up in tables, so that a look costs the same at any size."""

from typing import Final

import pytest

from shared.registry import Registry
from shared.registry.connection import Connection
from shared.registry.ledger import Release, Reserve
from tests.lua.exercise import MODEL, lead, make_ready

MANY: Final = 24
"""Replicas and reservations: more than a search is cheap for, fewer than Redis makes a table of."""


async def encodings(registry: Registry) -> dict[str, str]:
    """Tell how the server keeps what ledger/hot reads."""
    keys = registry.keys.model(MODEL)
    named = {name: keys.prefix + name for name in ("ready", "weight", "cost", "nreq")}
    named["lease"] = keys.lease("p1")
    return {
        name: (await registry.connection.command("OBJECT", "ENCODING", key)).decode()
        for name, key in named.items()
    }


async def contents(registry: Registry) -> list[object]:
    """Read the same keys."""
    books = await registry.ledger.books(MODEL, ["p1"])
    return [books.leases, books.requests, books.costs, books.ready, books.weights]


async def hold(registry: Registry, count: int) -> None:
    """Make replicas, and give each a request of its own."""
    await make_ready(registry, await lead(registry), *(f"r{n}" for n in range(count)))
    ops = [Reserve(f"q{n}", 7, n) for n in range(count)]
    await registry.ledger.batch(MODEL, "p1", ops)


@pytest.mark.parametrize("kind", ["redis", "valkey"], indirect=True)
async def test_a_beat_makes_tables_and_changes_nothing(door: Registry) -> None:
    """After a beat nothing is searched that may be long, and all data are as they were."""
    await hold(door, MANY)
    before = await contents(door)
    assert set((await encodings(door)).values()) == {"listpack"}
    await door.ledger.beat(MODEL, "p1")
    assert await encodings(door) == {
        "ready": "skiplist",
        "weight": "hashtable",
        "cost": "hashtable",
        "nreq": "hashtable",
        "lease": "hashtable",
    }
    assert await contents(door) == before


@pytest.mark.parametrize("kind", ["redis", "valkey"], indirect=True)
async def test_a_beat_leaves_short_lists_alone(door: Registry) -> None:
    """A few replicas and reservations are searched as fast as they are looked up."""
    await hold(door, 3)
    await door.ledger.beat(MODEL, "p1")
    assert set((await encodings(door)).values()) == {"listpack"}


async def test_a_beat_leaves_nothing_behind(door: Registry) -> None:
    """Tables vanish with their last field, on every kind of server."""
    await hold(door, MANY)
    await door.ledger.beat(MODEL, "p1")
    await door.ledger.batch(MODEL, "p1", [Release(f"q{n}") for n in range(MANY)])
    keys = door.keys.model(MODEL)
    for key in (keys.cost, keys.nreq, keys.lease("p1")):
        assert not await door.connection.command("EXISTS", key)


async def test_foreign_data_do_not_stop_a_beat(door: Registry, connection: Connection) -> None:
    """A proxy beats on, and is not reaped, whatever stands in a key of the ledger."""
    await hold(door, MANY)
    for name in ("ready", "weight", "cost", "nreq"):
        key = door.keys.model(MODEL).prefix + name
        await connection.command("DEL", key)
        await connection.command("RPUSH", key, "foreign")
        assert (await door.ledger.beat(MODEL, "p1")).leases == MANY
        await connection.command("DEL", key)
