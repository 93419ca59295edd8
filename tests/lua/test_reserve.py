"""What a reserve, a beat and a reap decide, one decision a test, on every kind of server."""

import asyncio

import pytest

from shared.errors import RegistryRefusedError
from shared.models.replica import ReplicaState
from shared.registry import Registry
from shared.registry.ledger import BUSY, HOT, NONE, Adopt, Release, Reserve, Totals
from tests.lua.exercise import MODEL, lead, make_ready, move


async def test_ties_are_spread(door: Registry) -> None:
    """Among idle replicas the caller's random number decides, and each of them can be chosen."""
    await make_ready(door, await lead(door), "r0", "r1", "r2")
    chosen: list[str | bool] = []
    for tie in range(6):
        reply = await door.ledger.batch(MODEL, "p1", [Reserve("a", 1, tie), Release("a")])
        chosen.append(reply.results[0])
    assert chosen == ["r0", "r1", "r2"] * 2


async def test_least_cost_wins(door: Registry) -> None:
    """The replica with the least outstanding cost gets the next request, within a batch too."""
    await make_ready(door, await lead(door), "r0", "r1")
    ops = [Reserve("a", 100, 0), Reserve("b", 10, 0), Reserve("c", 10, 0), Reserve("d", 10, 0)]
    assert (await door.ledger.batch(MODEL, "p1", ops)).results == ["r0", "r1", "r1", "r1"]


async def test_throughput_weighs_cost(door: Registry) -> None:
    """A replica of capacity 2 holds twice the cost before another is preferred."""
    fence = await lead(door)
    await make_ready(door, fence, "big", capacity=2.0)
    await make_ready(door, fence, "small")
    ops = [Reserve(f"q{n}", 10, 0) for n in range(9)]
    await door.ledger.batch(MODEL, "p1", ops)
    totals = await door.ledger.totals(MODEL)
    assert (totals["big"].requests, totals["small"].requests) == (6, 3)
    assert totals["*"] == Totals(90, 9)


async def test_none_and_busy(door: Registry) -> None:
    """No READY replica, or all excluded, is NONE; all at their caps is BUSY."""
    assert (await door.ledger.batch(MODEL, "p1", [Reserve("a", 1, 0)])).results == [NONE]
    await make_ready(door, await lead(door), "r0", max_requests=1)
    ops = [Reserve("a", 1, 0, exclude=("r0",)), Reserve("a", 1, 0), Reserve("b", 1, 0)]
    assert (await door.ledger.batch(MODEL, "p1", ops)).results == [NONE, "r0", BUSY]


async def test_known_request_keeps_its_replica(door: Registry) -> None:
    """A reserve that is sent again gets the same replica and counts once."""
    await make_ready(door, await lead(door), "r0", "r1")
    first = await door.ledger.batch(MODEL, "p1", [Reserve("a", 5, 1)])
    again = await door.ledger.batch(MODEL, "p1", [Reserve("a", 5, 0)])
    assert first.results == again.results == ["r1"]
    assert (await door.ledger.totals(MODEL))["*"].requests == 1


async def test_excluding_its_replica_moves_a_request(door: Registry) -> None:
    """A request that excludes the replica it holds moves in one operation."""
    await make_ready(door, await lead(door), "r0", "r1")
    ops = [Reserve("a", 5, 0), Reserve("a", 5, 0, exclude=("r0",))]
    assert (await door.ledger.batch(MODEL, "p1", ops)).results == ["r0", "r1"]
    totals = await door.ledger.totals(MODEL)
    assert totals == {"r1": (5, 1), "*": (5, 1)}


async def test_affinity_wins_within_its_bound(door: Registry) -> None:
    """An affinity candidate wins up to the bound, the least loaded first, and never when full."""
    fence = await lead(door)
    await make_ready(door, fence, "r0", "r1", "r2")
    await make_ready(door, fence, "full", max_requests=0)
    await door.specs.write(fence, MODEL, {"affinity_absolute": "10"})
    ops = [
        Adopt("x", "r1", 10),
        Adopt("y", "r2", 11),
        Reserve("a", 0, 0, affinity=(("r2", 0), ("r1", 0))),
        Reserve("b", 0, 0, affinity=(("full", 0), ("ghost", 0), ("r2", 0))),
        Reserve("c", 0, 0, affinity=(("r1", 0), ("r0", 0)), exclude=("r1",)),
    ]
    results = (await door.ledger.batch(MODEL, "p1", ops)).results
    assert results == [True, True, "r1", "r0", "r0"]


async def test_affinity_is_worth_what_it_saves(door: Registry) -> None:
    """A candidate wins where queue and request together are no longer than on the idlest one."""
    await make_ready(door, await lead(door), "r0", "r1")
    ops = [
        Adopt("x", "r1", 60),
        Reserve("a", 100, 0, affinity=(("r1", 39),)),
        Reserve("b", 100, 0, affinity=(("r1", 2),)),
    ]
    assert (await door.ledger.batch(MODEL, "p1", ops)).results == [True, "r1", "r0"]
    totals = await door.ledger.totals(MODEL)
    assert (totals["r1"], totals["r0"]) == (Totals(99, 2), Totals(100, 1))


async def test_the_soonest_candidate_wins(door: Registry) -> None:
    """Of several candidates the one wins that would have worked the request off first."""
    await make_ready(door, await lead(door), "r0", "r1", "r2")
    ops = [
        Adopt("x", "r1", 10),
        Adopt("y", "r2", 20),
        Reserve("a", 100, 0, affinity=(("r1", 70), ("r2", 50), ("r0", 100))),
        Reserve("b", 100, 0, affinity=(("r1", 30), ("r0", 40))),
        Reserve("c", 100, 0, affinity=(("r1", 30), ("r0", 30))),
    ]
    results = (await door.ledger.batch(MODEL, "p1", ops)).results
    assert results == [True, True, "r2", "r1", "r0"]


async def test_affinity_counts_work_at_each_replicas_speed(door: Registry) -> None:
    """What a slow replica would save is weighed at its own speed against a fast, idle one."""
    fence = await lead(door)
    await make_ready(door, fence, "fast", capacity=2.0)
    await make_ready(door, fence, "slow", capacity=0.5)
    ops = [
        Adopt("x", "slow", 1),
        Reserve("a", 100, 0, affinity=(("slow", 25),)),
        Release("a"),
        Reserve("b", 100, 0, affinity=(("slow", 24),)),
    ]
    results = (await door.ledger.batch(MODEL, "p1", ops)).results
    assert results == [True, "fast", True, "slow"]


@pytest.mark.parametrize("others", [0, 9], ids=["alone", "in a large batch"])
async def test_full_replicas_have_no_affinity(door: Registry, others: int) -> None:
    """However wide the relative bound, a full replica does not win by affinity."""
    fence = await lead(door)
    await make_ready(door, fence, "slow", capacity=0.001)
    await make_ready(door, fence, "full", max_requests=0)
    await door.specs.write(fence, MODEL, {"affinity_relative": "1000"})
    ops = [Adopt("x", "slow", 10**9), Reserve("a", 1, 0, affinity=(("full", 1),))]
    ops += [Release(f"other-{n}") for n in range(others)]
    assert (await door.ledger.batch(MODEL, "p1", ops)).results[:2] == [True, "slow"]


async def test_model_cap(door: Registry) -> None:
    """A model at its cap of reservations is BUSY for new requests and not for known ones."""
    fence = await lead(door)
    await make_ready(door, fence, "r0")
    await door.specs.write(fence, MODEL, {"max_requests": "1"})
    ops = [Reserve("a", 1, 0), Reserve("b", 1, 0), Reserve("a", 1, 0)]
    assert (await door.ledger.batch(MODEL, "p1", ops)).results == ["r0", BUSY, "r0"]


async def test_settling_the_cost(door: Registry) -> None:
    """Adopting a request on its own replica at a smaller cost only changes the cost."""
    await make_ready(door, await lead(door), "r0")
    ops = [Reserve("a", 100, 0), Adopt("a", "r0", 40), Adopt("a", "r0", 40)]
    assert (await door.ledger.batch(MODEL, "p1", ops)).results == ["r0", True, False]
    assert (await door.ledger.totals(MODEL))["r0"] == (40, 1)


@pytest.mark.parametrize(
    "args",
    [
        ["X", "a"],
        ["R"],
        ["R", ""],
        ["R", "a" * 201],
        ["A", "a", "1"],
        ["A", "a", "1", "1", "17", "0"],
        ["A", "a", "1", "1", "-1", "0"],
        ["A", "a", "1", "1", "nan", "0"],
        ["A", "a", "1", "1", "2", "0", "r1"],
        ["D", "a", "r 1", "1"],
        ["D", "a", "*", "1"],
        ["D", "a", "r1"],
        ["R", "a"] * 65,
    ],
    ids=lambda args: " ".join(args)[:24],
)
async def test_senseless_batches_do_nothing(door: Registry, args: list[str]) -> None:
    """A batch with one senseless argument is refused whole, with the argument's place."""
    await make_ready(door, await lead(door), "r0")
    keys = door.keys.model(MODEL).pick(HOT.keys, "p1")
    good = ["A", "good", "1", "0", "0", "0"]
    with pytest.raises(RegistryRefusedError, match="BADOP argument"):
        await door.connection.evalsha(HOT, keys, ["p1", *good, *args])
    assert await door.ledger.leases(MODEL, "p1") == {}


async def test_concurrent_proxies_never_exceed_a_cap(door: Registry) -> None:
    """Many proxies at once fill the caps exactly, and what they release leaves nothing behind."""
    await make_ready(door, await lead(door), "r0", "r1", "r2", max_requests=5)

    async def one(proxy: str) -> list[str | bool]:
        results: list[str | bool] = []
        for n in range(8):
            reply = await door.ledger.batch(MODEL, proxy, [Reserve(f"q{n}", 3, n)])
            results += reply.results
        return results

    proxies = [f"p{n}" for n in range(5)]
    answers = await asyncio.gather(*(one(proxy) for proxy in proxies))
    placed = [answer for each in answers for answer in each if answer != BUSY]
    assert sorted(placed, key=str) == ["r0"] * 5 + ["r1"] * 5 + ["r2"] * 5
    releases = [Release(f"q{n}") for n in range(8)]
    await asyncio.gather(*(door.ledger.batch(MODEL, proxy, releases) for proxy in proxies))
    assert await door.ledger.totals(MODEL) == {"*": (0, 0)}


async def test_draining_keeps_what_is_in_flight(door: Registry) -> None:
    """A replica that leaves READY gets no new request, and counts its old ones until released."""
    await make_ready(door, await lead(door), "r0", "r1")
    await door.ledger.batch(MODEL, "p1", [Reserve("a", 5, 0)])
    await move(door, "r0", ReplicaState.READY, ReplicaState.DRAINING)
    ops = [Reserve(f"q{n}", 100, 0) for n in range(3)]
    assert (await door.ledger.batch(MODEL, "p1", ops)).results == ["r1"] * 3
    assert (await door.ledger.totals(MODEL))["r0"] == (5, 1)
    await door.ledger.batch(MODEL, "p1", [Release("a")])
    assert "r0" not in await door.ledger.totals(MODEL)


async def test_the_reply_carries_the_routing_version(door: Registry) -> None:
    """Every batch and beat tells the version of the routes, so that a stale table shows."""
    await make_ready(door, await lead(door), "r0")
    snapshot = await door.replicas.snapshot(MODEL)
    assert (await door.ledger.batch(MODEL, "p1", [Release("a")])).ver == snapshot.ver
    assert (await door.ledger.beat(MODEL, "p1")).ver == snapshot.ver


async def test_beat(door: Registry) -> None:
    """The first beat finds the proxy unknown, the next known; waiting requests are added up."""
    await make_ready(door, await lead(door), "r0")
    first = await door.ledger.beat(MODEL, "p1", 3)
    second = await door.ledger.beat(MODEL, "p2", 4)
    third = await door.ledger.beat(MODEL, "p1", 0)
    assert (first.known, second.known, third.known) == (False, False, True)
    assert (first.waiting_total, second.waiting_total, third.waiting_total) == (3, 7, 4)
    assert third.silent == 0


async def age(door: Registry, proxy: str, by_ms: int) -> None:
    """Make a proxy's last beat older."""
    key = door.keys.model(MODEL).px
    await door.connection.command("ZINCRBY", key, -by_ms, proxy)


async def test_two_phases_before_a_reap(door: Registry) -> None:
    """A silent proxy is marked first, named only after the grace, and a beat clears the mark."""
    await make_ready(door, await lead(door), "r0")
    await door.ledger.batch(MODEL, "p1", [Reserve("a", 5, 0)])
    await age(door, "p1", 6000)
    assert (await door.ledger.beat(MODEL, "p2")).silent == 1
    assert await door.ledger.suspects(MODEL) == []
    assert await door.ledger.suspects(MODEL) == []
    assert await door.ledger.suspects(MODEL, grace_ms=0) == ["p1"]
    assert (await door.ledger.beat(MODEL, "p1")).known
    assert await door.ledger.suspects(MODEL, grace_ms=0) == []
    assert (await door.ledger.reap(MODEL, "p1")).alive


async def test_reaped_proxy_comes_back(door: Registry) -> None:
    """A frozen proxy that was reaped learns that it is unknown, and adopts what it still relays."""
    await make_ready(door, await lead(door), "r0")
    await door.ledger.beat(MODEL, "p1")
    await door.ledger.batch(MODEL, "p1", [Reserve("a", 5, 0), Reserve("b", 6, 0)])
    await age(door, "p1", 8000)
    assert await door.ledger.reap(MODEL, "p1") == (2, 0, False)
    assert await door.ledger.proxies(MODEL) == {}
    beat = await door.ledger.beat(MODEL, "p1")
    assert (beat.known, beat.leases) == (False, 0)
    await door.ledger.batch(MODEL, "p1", [Adopt("a", "r0", 5)])
    assert (await door.ledger.totals(MODEL))["*"] == (5, 1)


@pytest.mark.parametrize("by_ms", [3000, 3_600_000])
async def test_clock_that_went_back(door: Registry, by_ms: int) -> None:
    """A beat from the future (Redis' clock went back) is taken for now, and can be silent again.

    However little it went back: what a dead proxy held would wait that much longer to be reaped.
    """
    await make_ready(door, await lead(door), "r0")
    await door.ledger.beat(MODEL, "p1")
    await age(door, "p1", -by_ms)
    assert (await door.ledger.beat(MODEL, "p2")).silent == 1
    assert await door.ledger.suspects(MODEL) == []
    assert (await door.ledger.beat(MODEL, "p2")).silent == 0
    assert not (await door.ledger.reap(MODEL, "p3")).alive


async def test_large_reap_ends(door: Registry) -> None:
    """Reaping thousands of reservations in small steps makes progress at every step."""
    await make_ready(door, await lead(door), "r0", max_requests=10_000)
    for start in range(0, 1536, 64):
        ops = [Adopt(f"q{n}", "r0", 1) for n in range(start, start + 64)]
        await door.ledger.batch(MODEL, "p1", ops)
    await age(door, "p1", 8000)
    left = 1536
    while left:
        reply = await door.ledger.reap(MODEL, "p1", limit=100)
        assert reply.dropped == min(100, left)
        left = reply.left
    assert await door.ledger.totals(MODEL) == {"*": (0, 0)}


async def test_batches_are_bounded(door: Registry) -> None:
    """A batch of 65 is the caller's error; of too many candidates or exclusions some are used."""
    with pytest.raises(ValueError, match="64"):
        await door.ledger.batch(MODEL, "p1", [Release("a")] * 65)
    await make_ready(door, await lead(door), "r0", "r1")
    tried = tuple(f"x{n}" for n in range(40))
    ghosts = tuple((rid, 1) for rid in tried)
    ops = [
        Reserve("a", 1, 0, affinity=(("r1", 1), *ghosts)),
        Reserve("b", 1, 0, exclude=(*tried, "r0", "r1")),
    ]
    assert (await door.ledger.batch(MODEL, "p1", ops * 32)).results == ["r1", NONE] * 32
