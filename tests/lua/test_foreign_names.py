"""Foreign names in our keys: content that parses but names something else, or nothing sayable.

A name leads to further keys, and a name that may not stand in one is an error of the caller. So it
must end where it is read: as a corrupt record, not as an error in the loop of whoever reads it.
"""

import msgspec
import pytest

from shared.models.host import Hold, Host, Member, MemberKind
from shared.models.order import Order, OrderAction
from shared.registry import Registry
from tests.lua.exercise import DEPLOYMENT, MODEL, lead, make_ready, replica

BAD = "a{b} c"


@pytest.mark.parametrize("field", [BAD, "other"])
async def test_a_record_of_another_name_is_corrupt(door: Registry, field: str) -> None:
    """A fleet record that says another name than its field, or one that is none, is left out."""
    keys = door.keys.fleet
    said = BAD if field == BAD else "somebody"
    spec = msgspec.structs.replace(DEPLOYMENT.spec, name=said)
    records: dict[str, msgspec.Struct] = {
        keys.deployments: msgspec.structs.replace(DEPLOYMENT, spec=spec),
        keys.hosts: Host(host=said, address="a", cpus=1, memory_bytes=1),
        keys.members: Member(
            kind=MemberKind.AGENT, id=said, host="h", pid=1, version="1", started_ms=1
        ),
        keys.holds: Hold(subject=said, drain=True, since_ms=1),
        keys.orders("h1"): Order(
            rid=said, model=MODEL, gen=1, action=OrderAction.STOP, revision="r", spec=spec
        ),
    }
    for key, record in records.items():
        await door.connection.command("HSET", key, field, msgspec.json.encode(record))
    for found in (
        await door.fleet.deployments(),
        await door.fleet.hosts(),
        await door.fleet.members(),
        await door.fleet.holds(),
        await door.fleet.orders("h1"),
    ):
        assert (dict(found), found.corrupt) == ({}, (field,))


async def test_a_replica_on_a_host_that_is_no_name_is_corrupt(door: Registry) -> None:
    """A record whose host or id could never stand in a key is left out of the snapshot."""
    key = door.keys.model(MODEL).replicas
    nowhere = msgspec.structs.replace(replica("r1"), host=BAD)
    await door.connection.command("HSET", key, "r1", msgspec.json.encode(nowhere))
    await door.connection.command("HSET", key, BAD, msgspec.json.encode(replica(BAD)))
    snapshot = await door.replicas.snapshot(MODEL)
    assert snapshot.replicas == {}
    assert set(snapshot.corrupt) == {"r1", BAD}


async def test_a_proxy_that_is_no_name_is_not_reaped(door: Registry) -> None:
    """A foreign member among the proxies is nobody's reservation: no one is asked to drop it."""
    await make_ready(door, await lead(door), "r0")
    await door.ledger.beat(MODEL, "px-1")
    await door.connection.command("ZADD", door.keys.model(MODEL).px, 1, BAD)
    assert [await door.ledger.suspects(MODEL, grace_ms=0) for _ in range(2)] == [[], []]
    assert list(await door.ledger.proxies(MODEL)) == ["px-1"]
