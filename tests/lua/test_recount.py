"""A recount makes every total and score follow from the leases, at any moment; and the books."""

import asyncio
import itertools
import random

import pytest

from services.cli.audit import expected_score
from shared.registry import Registry
from shared.registry.ledger import RECOUNT, Adopt, Books, RecountReply, Release, Reserve
from tests.lua.exercise import MODEL, lead, make_ready

PROXIES = ("p1", "p2")


async def in_use(door: Registry) -> None:
    """Reserve some on three replicas through two proxies."""
    await make_ready(door, await lead(door), "r0", "r1", "r2", max_requests=3)
    for proxy in PROXIES:
        ops = [Reserve(f"{proxy}-{n}", 10 + n, n) for n in range(4)]
        await door.ledger.batch(MODEL, proxy, ops)


async def books(door: Registry) -> Books:
    """Read all accounts."""
    return await door.ledger.books(MODEL, PROXIES)


def agree(found: Books) -> bool:
    """Tell whether totals and scores follow from the leases."""
    leases = [lease for held in found.leases.values() for lease in held.values()]
    requests: dict[str, int] = {"*": len(leases)} if leases else {}
    costs: dict[str, int] = {}
    for lease in leases:
        requests[lease.rid] = requests.get(lease.rid, 0) + 1
        costs[lease.rid] = costs.get(lease.rid, 0) + lease.cost_tokens
    scores = {
        rid: expected_score(costs.get(rid, 0), requests.get(rid, 0), found.weights[rid])
        for rid in found.ready
    }
    return (found.requests, found.costs, found.ready) == (requests, costs, scores)


async def test_a_recount_of_what_is_right_changes_nothing(door: Registry) -> None:
    """True totals and scores are left alone, and the reservations are counted."""
    await in_use(door)
    before = await books(door)
    assert agree(before)
    assert await door.ledger.recount(MODEL) == RecountReply(0, 8)
    assert await books(door) == before


@pytest.mark.parametrize(
    "damage",
    [
        ("DEL", "cost"),
        ("DEL", "nreq"),
        ("HSET", "nreq", "r0", "77"),
        ("HSET", "nreq", "*", "1"),
        ("HSET", "nreq", "ghost", "1"),
        ("HSET", "cost", "r1", "nonsense"),
        ("HDEL", "cost", "r2"),
        ("ZADD", "ready", "5", "r1"),
    ],
    ids=" ".join,
)
async def test_a_recount_mends_what_was_changed_by_hand(
    door: Registry, damage: tuple[str, ...]
) -> None:
    """Whatever was done to totals and scores, they follow from the leases again."""
    await in_use(door)
    before = await books(door)
    command, suffix, *rest = damage
    await door.connection.command(command, door.keys.model(MODEL).prefix + suffix, *rest)
    assert await books(door) != before
    reply = await door.ledger.recount(MODEL)
    assert reply.corrected > 0
    assert reply.requests == 8
    assert await books(door) == before


async def test_totals_end_with_the_last_reservation(door: Registry) -> None:
    """Totals without any lease are removed, the model's own too."""
    await in_use(door)
    for proxy in PROXIES:
        await door.connection.command("DEL", door.keys.model(MODEL).lease(proxy))
    await door.ledger.recount(MODEL)
    found = await books(door)
    assert (found.requests, found.costs) == ({}, {})
    assert set(found.ready.values()) == {0.0}


async def test_a_proxy_that_is_not_named_stops_the_recount(door: Registry) -> None:
    """A recount never leaves out a proxy: one that came meanwhile is named in the refusal."""
    await in_use(door)
    keys = door.keys.model(MODEL)
    named = (*keys.pick(RECOUNT.keys), keys.lease("p1"))
    reply = await door.connection.evalsha(RECOUNT, named, ("p1",))
    assert reply == [b"CONFLICT", b"p2"]
    assert agree(await books(door))


async def test_a_holder_without_beat_is_put_where_it_can_be_reaped(door: Registry) -> None:
    """Leases whose proxy has no beat on record count, and can be reaped when it is dead."""
    await in_use(door)
    await door.connection.command("DEL", door.keys.model(MODEL).px)
    assert await door.ledger.recount(MODEL, PROXIES) == RecountReply(0, 8)
    assert set(await door.ledger.proxies(MODEL)) == set(PROXIES)


async def test_foreign_members_do_not_stop_a_recount(door: Registry) -> None:
    """A member of `px` that cannot be a proxy's name holds nothing."""
    await in_use(door)
    await door.connection.command("ZADD", door.keys.model(MODEL).px, 1, "no{name}")
    assert (await door.ledger.recount(MODEL)).requests == 8


async def test_recounts_under_load_are_right(door: Registry) -> None:
    """While proxies reserve and release, totals are damaged and recounted: nothing is lost."""
    await in_use(door)
    pick = random.Random(3)
    numbers = itertools.count()
    keys = door.keys.model(MODEL)

    async def load(proxy: str) -> None:
        for _ in range(40):
            request = f"{proxy}-x{next(numbers)}"
            await door.ledger.batch(MODEL, proxy, [Reserve(request, 7, pick.randrange(99))])
            await door.ledger.batch(MODEL, proxy, [Adopt(request, "r1", 3), Release(request)])

    async def damage() -> None:
        for _ in range(20):
            await door.connection.command("DEL", pick.choice((keys.cost, keys.nreq)))
            await door.ledger.recount(MODEL)

    await asyncio.gather(load("p1"), load("p2"), damage())
    await door.ledger.recount(MODEL)
    found = await books(door)
    assert agree(found)
    assert sum(len(held) for held in found.leases.values()) == 8


async def test_a_beat_leaves_nothing_behind_for_a_model_that_is_gone(door: Registry) -> None:
    """A beat that comes after a model's deletion creates no key again."""
    fence = await lead(door)
    await door.specs.write(fence, MODEL, {"max_requests": "9"})
    await door.ledger.beat(MODEL, "p1", 3)
    assert isinstance(await door.specs.forget(fence, MODEL), int)
    beat = await door.ledger.beat(MODEL, "p1", 3)
    assert (beat.leases, beat.known) == (0, False)
    assert await door.ledger.proxies(MODEL) == {}
    keys = door.keys.model(MODEL)
    for key in (keys.px, keys.wait, keys.ver):
        assert await door.connection.command("EXISTS", key) == 0
