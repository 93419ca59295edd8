"""Replica records, specs, leadership and the fleet: happy paths and refusals, on every server."""

import msgspec
import pytest

from shared.errors import InvalidInputError
from shared.models.event import Event, EventLevel
from shared.models.host import Hold, Host, Member, MemberKind
from shared.models.order import Order, OrderAction
from shared.models.replica import TRANSITIONS, ReplicaState
from shared.models.routing import ModelSpec
from shared.registry import Registry
from shared.registry.keys import MODEL_KEYS
from shared.registry.leadership import Following, Leading
from shared.registry.ledger import Reserve
from shared.registry.replicas import ReplicaBeat
from shared.registry.results import Fence, RefusalCode, Refused, Written
from shared.registry.specs import spec_fields
from tests.lua.exercise import DEPLOYMENT, MODEL, ROUTING, lead, make_ready, move, replica
from tests.support.waiting import wait_until

PENDING, STARTING, READY = ReplicaState.PENDING, ReplicaState.STARTING, ReplicaState.READY
FAILED = ReplicaState.FAILED


def code(outcome: object) -> RefusalCode:
    """Read a refusal's code."""
    assert isinstance(outcome, Refused), outcome
    return outcome.code


async def test_life_of_a_replica(door: Registry) -> None:
    """Each step of a life is written with a higher version, and the record tells state and time."""
    fence = await lead(door)
    versions: list[int] = []
    outcome = await door.replicas.create(fence, replica("r0"))
    steps = (PENDING, STARTING, READY, ReplicaState.UNHEALTHY, READY, ReplicaState.DRAINING)
    for before, after in zip(steps, (*steps[1:], ReplicaState.STOPPED), strict=True):
        assert isinstance(outcome, Written)
        assert outcome.state == before
        versions.append(outcome.ver)
        stored = (await door.replicas.snapshot(MODEL)).replicas["r0"]
        assert (stored.state, stored.ver) == (before, outcome.ver)
        assert stored.since_ms > 0
        outcome = await move(door, "r0", before, after)
    assert isinstance(await door.replicas.delete(fence, MODEL, "r0", 7), Written)
    assert (await door.replicas.snapshot(MODEL)).replicas == {}
    assert versions == sorted(set(versions))


async def test_every_transition_follows_the_table(door: Registry) -> None:
    """From each state exactly the transitions of the table are written; the rest is ILLEGAL."""
    for state in ReplicaState:
        for target in ReplicaState:
            rid = f"{state}-{target}"
            await door.replicas.register(replica(rid, state=state))
            outcome = await move(door, rid, state, target)
            if target in TRANSITIONS[state] or target == state:
                assert isinstance(outcome, Written), rid
            else:
                assert code(outcome) is RefusalCode.ILLEGAL, rid


async def test_only_ready_replicas_are_ready(door: Registry) -> None:
    """The ready set holds a replica in the very step in which it is READY, and no other."""
    fence = await lead(door)
    key = door.keys.model(MODEL).ready
    for state in ReplicaState:
        await door.replicas.register(replica(f"in-{state}", state=state))
    assert await door.connection.command("ZRANGE", key, 0, -1) == [b"in-READY"]
    await move(door, "in-READY", READY, FAILED)
    assert await door.connection.command("ZCARD", key) == 0
    await make_ready(door, fence, "r0")
    assert await door.connection.command("ZRANGE", key, 0, -1) == [b"r0"]


async def test_stale_incarnation(door: Registry) -> None:
    """A zombie agent of another incarnation changes nothing, and learns the right one."""
    await make_ready(door, await lead(door), "r0")
    outcome = await move(door, "r0", READY, FAILED, gen=6)
    assert outcome == Refused(RefusalCode.STALEGEN, "7")
    assert (await door.replicas.snapshot(MODEL)).replicas["r0"].state is READY
    beats = [ReplicaBeat(rid="r0", gen=6), ReplicaBeat(rid="ghost", gen=7)]
    assert await door.replicas.heartbeat(MODEL, beats) == ["r0", "ghost"]


async def test_conflict_and_absent(door: Registry) -> None:
    """A lost race names the state that is there; a record that is not there is ABSENT."""
    fence = await lead(door)
    await make_ready(door, fence, "r0")
    outcome = await move(door, "r0", STARTING, FAILED)
    assert outcome == Refused(RefusalCode.CONFLICT, "READY")
    assert code(await move(door, "ghost", READY, FAILED)) is RefusalCode.ABSENT
    assert code(await door.replicas.delete(fence, MODEL, "ghost", 7)) is RefusalCode.ABSENT


async def test_creating_twice(door: Registry) -> None:
    """A record that is there is never overwritten, by controller or agent."""
    fence = await lead(door)
    await make_ready(door, fence, "r0")
    outcome = await door.replicas.create(fence, replica("r0", gen=9))
    assert outcome == Refused(RefusalCode.EXISTS, "7 READY")
    assert code(await door.replicas.register(replica("r0", gen=9))) is RefusalCode.EXISTS
    assert code(await door.replicas.create(fence, replica("r1", state=READY))) is (
        RefusalCode.ILLEGAL
    )


async def test_deleting_what_lives(door: Registry) -> None:
    """A record is deleted only when ended, and only by its incarnation."""
    fence = await lead(door)
    await make_ready(door, fence, "r0")
    assert code(await door.replicas.delete(fence, MODEL, "r0", 7)) is RefusalCode.ILLEGAL
    await move(door, "r0", READY, FAILED)
    assert code(await door.replicas.delete(fence, MODEL, "r0", 6)) is RefusalCode.STALEGEN


async def test_lower_epoch_is_fenced(door: Registry) -> None:
    """Once a new leader raised the fence, every write of the old one is refused, without effect."""
    old = await lead(door, "c1")
    await make_ready(door, old, "r0")
    await door.leadership.resign("c1")
    new = await lead(door, "c2")
    assert new.epoch > old.epoch
    before = await door.replicas.snapshot(MODEL)
    assert isinstance(await door.specs.raise_fence(new, MODEL), int)
    outcomes = [
        await door.replicas.create(old, replica("r9")),
        await move(door, "r0", READY, FAILED, fence=old),
        await door.replicas.patch("r0", MODEL, gen=7, patch={"penalty": 1}, fence=old),
        await door.replicas.delete(old, MODEL, "r0", 7),
        await door.specs.write(old, MODEL, spec_fields(ROUTING)),
        await door.specs.raise_fence(old, MODEL),
        await door.specs.forget(old, MODEL),
        await door.fleet.put_order(old, "h1", order("r0")),
        await door.fleet.drop_order(old, "h1", "r0"),
        await door.fleet.forget_host(old, "h1"),
        await door.fleet.forget_deployment(old, MODEL),
        await door.fleet.expel_member(old, "agent:h1"),
        await door.fleet.clear_hold(old, "replica:r0"),
        await door.fleet.tell(old, Event(kind="Late", subject="host/h1", message="")),
    ]
    assert [code(outcome) for outcome in outcomes] == [RefusalCode.FENCED] * len(outcomes)
    assert await door.replicas.snapshot(MODEL) == before
    impostor = Fence(new.epoch, "c3")
    assert code(await door.specs.raise_fence(impostor, MODEL)) is RefusalCode.FENCED
    assert isinstance(await move(door, "r0", READY, FAILED, fence=new), Written)


async def test_one_epoch_has_one_owner(door: Registry) -> None:
    """Where a failover gave one epoch to two owners, only the one with the lease may write."""
    fence = await lead(door, "c1")
    twin = Fence(fence.epoch, "c2")
    assert await door.fleet.put_order(fence, "h1", order("r0")) is None
    outcomes = [
        await door.fleet.put_order(twin, "h1", order("r0")),
        await door.fleet.drop_order(twin, "h1", "r0"),
        await door.fleet.expel_member(twin, "agent:h1"),
        await door.fleet.clear_hold(twin, "replica:r0"),
        await door.fleet.tell(twin, Event(kind="Late", subject="host/h1", message="")),
    ]
    assert [code(outcome) for outcome in outcomes] == [RefusalCode.FENCED] * len(outcomes)
    print(f"\n{len(outcomes)} of {len(outcomes)} kinds of write refused")  # noqa: T201 - figures for the reader
    assert list(await door.fleet.orders("h1")) == ["r0"]
    await door.leadership.resign("c1")
    assert await door.fleet.drop_order(fence, "h1", "r0") is None


async def test_what_the_leader_clears_away(door: Registry) -> None:
    """The leader expels silent members, clears holds and tells events; a repeat is no trouble."""
    fence = await lead(door)
    member = Member(kind=MemberKind.AGENT, id="h1", host="h1", pid=1, version="0", started_ms=1)
    await door.fleet.beat(member)
    await door.fleet.put_hold(Hold(subject="replica:r0", drain=True, since_ms=1))
    for _ in range(2):
        assert await door.fleet.expel_member(fence, member.field) is None
        assert await door.fleet.clear_hold(fence, "replica:r0") is None
    assert (await door.fleet.members(), await door.fleet.holds()) == ({}, {})
    told = Event(kind="Told", subject="host/h1", message="é", level=EventLevel.ERROR, at_ms=7)
    assert await door.fleet.tell(fence, told) is None
    (event,) = await door.fleet.events(5)
    assert msgspec.structs.replace(event, id="") == told


async def test_corrupt_record_counts_as_absent(door: Registry) -> None:
    """A record that does not parse is named, is ABSENT to its agent, and can be written again."""
    fence = await lead(door)
    await make_ready(door, fence, "r0", "r1")
    key = door.keys.model(MODEL).replicas
    for text in ("", "{", "[]", "5", "null", '"x"', '{"state": "READY"}', "[" * 5000):
        await door.connection.command("HSET", key, "r0", text)
        snapshot = await door.replicas.snapshot(MODEL)
        assert (snapshot.corrupt, list(snapshot.replicas)) == (("r0",), ["r1"])
        assert code(await move(door, "r0", READY, FAILED)) is RefusalCode.ABSENT
        assert await door.replicas.heartbeat(MODEL, [ReplicaBeat(rid="r0", gen=7)]) == ["r0"]
    assert isinstance(await door.replicas.register(replica("r0", state=READY)), Written)
    await door.connection.command("HSET", key, "r1", msgspec.json.encode(replica("other")))
    assert (await door.replicas.snapshot(MODEL)).corrupt == ("r1",)


async def test_patch(door: Registry) -> None:
    """A patch changes what it names and nothing else, and cannot touch identity or state."""
    await make_ready(door, await lead(door), "r0", url="http://127.0.0.1:1")
    before = (await door.replicas.snapshot(MODEL)).replicas["r0"]
    patch = {"reason": 'é "x" / \\', "api_key_env": "KEY", "capacity": 0.5}
    outcome = await door.replicas.patch("r0", MODEL, gen=7, patch=patch, fence=None)
    assert isinstance(outcome, Written)
    after = (await door.replicas.snapshot(MODEL)).replicas["r0"]
    assert after == msgspec.structs.replace(
        before, ver=outcome.ver, reason=patch["reason"], api_key_env="KEY", capacity=0.5
    )
    again = await door.replicas.patch("r0", MODEL, gen=7, patch=patch, fence=None)
    assert again == outcome
    with pytest.raises(InvalidInputError, match="gen"):
        await door.replicas.patch("r0", MODEL, gen=7, patch={"gen": 8}, fence=None)


async def test_versions_grow_after_a_loss(door: Registry) -> None:
    """A forgotten version or epoch is never used again: the clock went on."""
    fence = await lead(door)
    await make_ready(door, fence, "r0")
    ver = (await door.replicas.snapshot(MODEL)).ver

    async def clock_is_past_the_burst() -> bool:
        return await door.replicas.server_time_ms() > ver

    await wait_until(clock_is_past_the_burst)
    await door.connection.command("DEL", door.keys.model(MODEL).ver)
    outcome = await move(door, "r0", READY, FAILED)
    assert isinstance(outcome, Written)
    assert outcome.ver > ver
    await door.connection.command("DEL", door.keys.fleet.epoch)
    await door.connection.command("DEL", door.keys.fleet.leader)
    assert (await lead(door, "c2")).epoch > fence.epoch


async def test_version_grows_when_the_clock_went_back(door: Registry) -> None:
    """A version ahead of the clock still grows by one."""
    fence = await lead(door)
    ahead = 4_000_000_000_000
    await door.connection.command("SET", door.keys.model(MODEL).ver, ahead)
    outcome = await door.replicas.create(fence, replica("r0"))
    assert isinstance(outcome, Written)
    assert outcome.ver == ahead + 1


async def test_spec(door: Registry) -> None:
    """A spec is read back as written; the same again keeps the version, another raises it."""
    fence = await lead(door)
    empty = await door.replicas.snapshot(MODEL)
    assert (empty.ver, empty.authoritative) == (0, False)
    routing = ModelSpec(
        model=MODEL,
        aliases=("Org/Llama", "ll"),
        generation=4,
        desired_replicas=3,
        max_requests=7,
        request_timeout_s=1.5,
        affinity_relative=1.25,
        prefix_affinity=False,
        created_ms=99,
    )
    first = await door.specs.write(fence, MODEL, spec_fields(routing))
    assert await door.specs.write(fence, MODEL, spec_fields(routing)) == first
    snapshot = await door.replicas.snapshot(MODEL)
    assert snapshot.authoritative
    assert snapshot.spec == msgspec.structs.replace(routing, epoch=fence.epoch)
    fields = spec_fields(routing)
    del fields["runner"]
    second = await door.specs.write(fence, MODEL, fields)
    assert isinstance(first, int)
    assert isinstance(second, int)
    assert second > first
    key = door.keys.model(MODEL).spec
    assert await door.connection.command("HEXISTS", key, "runner") == 0


async def test_corrupt_spec_fields_keep_their_defaults(door: Registry) -> None:
    """Foreign text in the spec hash never breaks a snapshot or a reserve."""
    fence = await lead(door)
    await make_ready(door, fence, "r0")
    await door.specs.write(fence, MODEL, spec_fields(ROUTING))
    key = door.keys.model(MODEL).spec
    for field in ("aliases", "max_requests", "affinity_relative", "request_timeout_s", "runner"):
        for text in ("", "nan", "{", "inf", "\ud800".encode("utf-8", "surrogatepass")):
            await door.connection.command("HSET", key, field, text)
            spec = (await door.replicas.snapshot(MODEL)).spec
            assert spec.max_requests == 100_000
            assert 0 < spec.request_timeout_s < 1e6
            reply = await door.ledger.batch(MODEL, "p1", [Reserve("a", 1, 0)])
            assert reply.results == ["r0"]


async def test_forgetting_a_model(door: Registry) -> None:
    """A model goes only without replicas and reservations, and then leaves only its fence."""
    fence = await lead(door)
    await make_ready(door, fence, "r0")
    await door.specs.write(fence, MODEL, spec_fields(ROUTING))
    assert code(await door.specs.forget(fence, MODEL)) is RefusalCode.CONFLICT
    await move(door, "r0", READY, FAILED)
    await door.replicas.delete(fence, MODEL, "r0", 7)
    await door.ledger.beat(MODEL, "p1", 1)
    assert isinstance(await door.specs.forget(fence, MODEL), int)
    snapshot = await door.replicas.snapshot(MODEL)
    assert (snapshot.ver, snapshot.replicas, snapshot.authoritative) == (0, {}, False)
    assert await door.ledger.proxies(MODEL) == {}
    late = Fence(fence.epoch - 1, "c0")
    assert code(await door.replicas.create(late, replica("r1"))) is RefusalCode.FENCED
    keys = door.keys.model(MODEL)
    left = [s for s in MODEL_KEYS if await door.connection.command("EXISTS", keys.prefix + s)]
    assert left == ["fence"]


async def test_leadership(door: Registry) -> None:
    """One leads, the others follow; renewing keeps the epoch, a new holder gets a higher one."""
    first = await door.leadership.try_lead("c1")
    assert isinstance(first, Leading)
    follower = await door.leadership.try_lead("c2")
    assert isinstance(follower, Following)
    assert follower.owner == "c1"
    assert 0 < follower.ttl_left_ms <= 5000
    again = await door.leadership.try_lead("c1")
    assert isinstance(again, Leading)
    assert again.epoch == first.epoch
    await door.leadership.resign("c2")
    assert isinstance(await door.leadership.try_lead("c2"), Following)
    await door.leadership.resign("c1")
    second = await door.leadership.try_lead("c2")
    assert isinstance(second, Leading)
    assert second.epoch > first.epoch


@pytest.mark.parametrize("act", [("PERSIST",), ("PEXPIRE", 3_600_000)], ids=str)
async def test_absurd_lease_is_cut(door: Registry, act: tuple[str, *tuple[int, ...]]) -> None:
    """A lease without end, or of an hour, is cut to its normal length by whoever asks next."""
    await lead(door, "c1")
    await door.connection.command(act[0], door.keys.fleet.leader, *act[1:])
    follower = await door.leadership.try_lead("c2")
    assert isinstance(follower, Following)
    assert follower.ttl_left_ms == 5000
    assert 0 < await door.connection.command("PTTL", door.keys.fleet.leader) <= 5000


async def test_epoch_raised_elsewhere(door: Registry) -> None:
    """A leader whose epoch is not the last one any more gets a new, higher one."""
    fence = await lead(door)
    await door.connection.command("SET", door.keys.fleet.epoch, fence.epoch + 10_000_000)
    assert (await lead(door)).epoch == fence.epoch + 10_000_001


async def test_declaring(door: Registry) -> None:
    """Of two operators who saw the same generation, the second is told; a repeat is fine."""
    assert await door.fleet.declare(MODEL, DEPLOYMENT, 0)
    assert await door.fleet.declare(MODEL, DEPLOYMENT, 0)
    second = msgspec.structs.replace(DEPLOYMENT, generation=2, replicas=5)
    third = msgspec.structs.replace(DEPLOYMENT, generation=2, replicas=9)
    assert await door.fleet.declare(MODEL, second, 1)
    assert not await door.fleet.declare(MODEL, third, 1)
    assert await door.fleet.deployments() == {MODEL: second}
    fence = await lead(door)
    outcome = await door.fleet.forget_deployment(fence, MODEL)
    assert code(outcome) is RefusalCode.CONFLICT
    gone = msgspec.structs.replace(DEPLOYMENT, generation=3, deleted=True)
    assert await door.fleet.declare(MODEL, gone, 2)
    assert await door.fleet.forget_deployment(fence, MODEL) is None
    assert await door.fleet.deployments() == {}
    assert await door.connection.command("HLEN", door.keys.fleet.revisions) == 0


async def test_corrupt_fleet_records(door: Registry) -> None:
    """Foreign data in the fleet's hashes is named, hides nothing else, and can be replaced."""
    keys = door.keys.fleet
    await door.fleet.declare(MODEL, DEPLOYMENT, 0)
    host = Host(host="h1", address="a", cpus=1, memory_bytes=1)
    await door.fleet.put_host(host)
    for key in (keys.deployments, keys.hosts, keys.holds, keys.members, keys.orders("h1")):
        await door.connection.command("HSET", key, "bad", b"\xff{")
    deployments = await door.fleet.deployments()
    assert (list(deployments), deployments.corrupt) == ([MODEL], ("bad",))
    hosts = await door.fleet.hosts()
    assert (dict(hosts), hosts.corrupt) == ({"h1": host}, ("bad",))
    for records in (
        await door.fleet.holds(),
        await door.fleet.members(),
        await door.fleet.orders("h1"),
    ):
        assert records == {}
        assert records.corrupt == ("bad",)
    assert await door.fleet.declare("bad", DEPLOYMENT, 0)


def order(rid: str, action: OrderAction = OrderAction.RUN) -> Order:
    """Make an order."""
    return Order(rid=rid, model=MODEL, gen=7, action=action, revision="abc", spec=DEPLOYMENT.spec)


async def test_orders_and_hosts(door: Registry) -> None:
    """The leader gives, changes and drops orders; a forgotten host takes its orders along."""
    fence = await lead(door)
    await door.fleet.put_host(Host(host="h1", address="a", cpus=1, memory_bytes=1))
    assert await door.fleet.put_order(fence, "h1", order("r0")) is None
    assert await door.fleet.put_order(fence, "h1", order("r1")) is None
    assert await door.fleet.put_order(fence, "h1", order("r1", OrderAction.STOP)) is None
    assert await door.fleet.drop_order(fence, "h1", "r0") is None
    assert await door.fleet.orders("h1") == {"r1": order("r1", OrderAction.STOP)}
    assert await door.fleet.forget_host(fence, "h1") is None
    assert (await door.fleet.orders("h1"), await door.fleet.hosts()) == ({}, {})


async def test_members_and_holds(door: Registry) -> None:
    """A member is seen when it beats, ages by Redis' clock and goes when forgotten; so do holds."""
    member = Member(kind=MemberKind.AGENT, id="h1", host="h1", pid=1, version="0", started_ms=1)
    await door.fleet.beat(member)
    await door.connection.command("ZINCRBY", door.keys.fleet.hb, -9000, member.field)
    seen = (await door.fleet.members())["agent:h1"]
    assert seen.member == member
    assert 9000 <= seen.seen_ms_ago < 60_000
    await door.fleet.forget_member("agent:h1")
    assert await door.fleet.members() == {}
    hold = Hold(subject="host:h1", drain=True, since_ms=1)
    await door.fleet.put_hold(hold)
    assert await door.fleet.holds() == {"host:h1": hold}
    assert await door.fleet.drop_hold("host:h1")
    assert not await door.fleet.drop_hold("host:h1")


async def test_heartbeats(door: Registry) -> None:
    """A heartbeat stores Redis' time and the engine's report, within sane bounds."""
    await make_ready(door, await lead(door), "r0")
    beat = ReplicaBeat(rid="r0", gen=7, running=3, waiting=1, kv_usage=7.0)
    assert await door.replicas.heartbeat(MODEL, [beat]) == []
    pulse = await door.replicas.pulse(MODEL)
    stat = pulse.stats["r0"]
    assert (stat.running, stat.waiting, stat.kv_usage) == (3, 1, 1.0)
    assert pulse.beats_ms["r0"] == stat.at_ms <= pulse.now_ms
    assert abs(await door.replicas.server_time_ms() - pulse.now_ms) < 60_000


async def test_events(door: Registry) -> None:
    """Events are read newest or from a place on, oldest first; foreign entries are left out."""
    assert await door.fleet.events(5) == []
    for number in range(4):
        event = Event(kind="Tested", subject=f"replica/r{number}", message="é", at_ms=number)
        await door.fleet.emit(event)
    await door.connection.command("XADD", door.keys.fleet.events, "*", "foreign", "x")
    await door.fleet.emit(Event(kind="Last", subject="x", message="", level=EventLevel.ERROR))
    newest = await door.fleet.events(4)
    assert [event.subject for event in newest] == ["replica/r2", "replica/r3", "x"]
    assert (newest[0].message, newest[0].at_ms, newest[2].level) == ("é", 2, "error")
    assert newest[2].at_ms > 1_600_000_000_000
    later = await door.fleet.events(2, after_id=newest[0].id)
    assert [event.subject for event in later] == ["replica/r3"]
