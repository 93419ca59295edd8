"""Controllers against a real Redis: election, fencing, takeover, and the whole loop."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import pytest

from services.controller.act import Actor
from services.controller.actions import CreateReplica, WriteSpec
from services.controller.app import Controller
from services.controller.draft import tell
from services.controller.events import EventLog
from services.controller.metrics import Metrics
from services.controller.observe import observe
from services.controller.plan import plan
from services.controller.reaper import reap_dead_proxies
from services.controller.settings import ControllerSettings
from shared.clock import ManualClock, SystemClock
from shared.errors import LeadershipLostError
from shared.lifecycle import Loops
from shared.models.host import Hold, Member, MemberKind
from shared.models.replica import Replica, ReplicaState
from shared.models.routing import ModelSpec
from shared.registry import Registry, open_registry
from shared.registry.leadership import Following, Leading
from shared.registry.ledger import Reserve
from shared.registry.results import Fence
from shared.registry.specs import parse_spec, spec_fields
from shared.secret import Secret
from tests.support.servers import RedisServer, Servers
from tests.support.waiting import wait_until
from tests.unit.controller.agents import ObedientAgent
from tests.unit.controller.fleet import declared, host


class FixedProber:
    """Every engine answers, or none does."""

    def __init__(self, *, answer: bool = True) -> None:
        self.answer = answer

    async def answers(self, replica: Replica) -> bool:
        """Tell what was fixed, whatever it is asked about."""
        return self.answer and bool(replica.rid)


@pytest.fixture
def server(servers: Servers) -> RedisServer:
    """Start a Redis of this test's own, which it may stop."""
    return servers.new()


@pytest.fixture
def settings(server: RedisServer) -> ControllerSettings:
    """Make settings for controllers that hurry."""
    return ControllerSettings(
        redis_url=Secret(server.url), lease_ttl_ms=1_000, interval_s=0.1, settle_s=0.2
    )


@pytest.fixture
async def registry(settings: ControllerSettings) -> AsyncGenerator[Registry]:
    """Open the registry as a test looks at it."""
    opened = await open_registry(settings)
    yield opened
    await opened.aclose()


@asynccontextmanager
async def running(settings: ControllerSettings, name: str) -> AsyncGenerator[Controller]:
    """Run one controller with a connection of its own, without a process of its own."""
    registry = await open_registry(settings)
    controller = Controller(settings, registry, FixedProber(), SystemClock(), name)
    member = Member(kind=MemberKind.CONTROLLER, id=name, host="h", pid=1, version="0", started_ms=0)
    try:
        async with Loops() as loops:
            controller.start(loops, member)
            yield controller
    finally:
        await registry.aclose()


@asynccontextmanager
async def obeying(settings: ControllerSettings, *names: str) -> AsyncGenerator[None]:
    """Run an agent for each host."""
    registry = await open_registry(settings)
    try:
        async with Loops() as loops:
            for name in names:
                loops.start(name, ObedientAgent(registry, host(name)).work())
            yield
    finally:
        await registry.aclose()


def acting(
    registry: Registry, fence: Fence, *, may_act: Callable[[], bool] = lambda: True
) -> Actor:
    """Make an actor of the reign that `fence` stands for."""
    events = EventLog(registry.fleet, SystemClock(), f"controller/{fence.owner}")
    return Actor(registry, events, fence, may_act, Metrics().count_action)


async def ready(registry: Registry, model: str = "m") -> list[Replica]:
    """Give the READY replicas of `model`."""
    records = (await registry.replicas.snapshot(model)).replicas.values()
    return [record for record in records if record.state is ReplicaState.READY]


async def kinds(registry: Registry) -> list[str]:
    """Give the kinds of all events so far."""
    return [event.kind for event in await registry.fleet.events(1000)]


async def test_a_deployment_lives_its_whole_life(
    settings: ControllerSettings, registry: Registry
) -> None:
    """Declared, scaled up, rolled, drained from a host, scaled down, deleted: the fleet follows."""

    async def serves(count: int, dtype: str = "auto") -> None:
        revision = declared(dtype=dtype).spec.revision()

        async def as_wanted() -> bool:
            records = list((await registry.replicas.snapshot("m")).replicas.values())
            return [(r.state, r.revision) for r in records] == [
                (ReplicaState.READY, revision)
            ] * count

        await wait_until(as_wanted, what=f"{count} replicas of {dtype}")

    async def declare(replicas: int, dtype: str = "auto", *, deleted: bool = False) -> None:
        old = (await registry.fleet.deployments()).get("m")
        before = old.generation if old else 0
        deployment = msgspec.structs.replace(
            declared(replicas=replicas, dtype=dtype), generation=before + 1, deleted=deleted
        )
        assert await registry.fleet.declare("m", deployment, before)

    async with running(settings, "c1"), obeying(settings, "h0", "h1"):
        await declare(2)
        await serves(2)
        assert (await registry.replicas.snapshot("m")).authoritative
        await declare(4)
        await serves(4)
        await declare(4, "float32")
        await serves(4, "float32")
        await registry.fleet.put_hold(Hold(subject="host:h0", drain=True, since_ms=0))
        await wait_until(lambda: _hosts_are(registry, {"h1"}), what="h0 is empty")
        await declare(1, "float32")
        await serves(1, "float32")
        await declare(1, "float32", deleted=True)
        await wait_until(lambda: _forgotten(registry), what="the deployment is forgotten")
    found = await kinds(registry)
    assert {
        "LeaderElected",
        "ReplicaCreated",
        "ScaledUp",
        "RolledOut",
        "ReplicaDraining",
        "ScaledDown",
        "DeploymentForgotten",
    } <= set(found)


async def _hosts_are(registry: Registry, names: set[str]) -> bool:
    records = (await registry.replicas.snapshot("m")).replicas.values()
    return {record.host for record in records} == names and len(await ready(registry)) == 4


async def _forgotten(registry: Registry) -> bool:
    return not await registry.fleet.deployments()


async def test_a_standby_takes_over_from_a_leader_that_vanished(
    settings: ControllerSettings, registry: Registry
) -> None:
    """Within one and a half lease times after the leader stops, the other one acts."""
    settings = msgspec.structs.replace(settings, lease_ttl_ms=2_000)
    async with AsyncExitStack() as leaders, AsyncExitStack() as standbys:
        leader = await leaders.enter_async_context(running(settings, "c1"))
        await wait_until(leader.leader.reign)
        standby = await standbys.enter_async_context(running(settings, "c2"))
        await wait_until(lambda: standby.not_ready() is None)
        assert standby.leader.reign() is None
        await leaders.aclose()
        gone_s = time.monotonic()
        assert await registry.fleet.declare("m", declared(), 0)
        await wait_until(lambda: _authoritative(registry), interval_s=0.01)
        assert time.monotonic() - gone_s < 1.5 * 2


async def _authoritative(registry: Registry) -> bool:
    return (await registry.replicas.snapshot("m")).authoritative


async def test_a_stale_leader_is_fenced_off(
    settings: ControllerSettings, registry: Registry
) -> None:
    """Writes of a leader that another one has followed are refused, and it stops at once."""
    await registry.fleet.declare("m", declared(), 0)
    first = await registry.leadership.try_lead("c1", 100)
    assert isinstance(first, Leading)
    stale = acting(registry, Fence(first.epoch, "c1"))
    await stale.raise_fences(["m"])

    async def taken() -> bool:
        return isinstance(await registry.leadership.try_lead("c2", 5000), Leading)

    await wait_until(taken)
    second = await registry.leadership.try_lead("c2", 5000)
    assert isinstance(second, Leading)
    assert second.epoch > first.epoch
    actor = acting(registry, Fence(second.epoch, "c2"))
    await actor.raise_fences(["m"])
    action = WriteSpec(spec=ModelSpec(model="m", created_ms=1), reason="late")
    with pytest.raises(LeadershipLostError):
        await stale.carry_out([action])
    assert not await _authoritative(registry)
    assert await actor.carry_out([action]) == 1


async def test_nothing_is_written_after_the_reign(registry: Registry) -> None:
    """An actor asks before each write, and does none once its time is over."""
    left = [True, False]
    actor = acting(registry, Fence(1, "c1"), may_act=lambda: left.pop(0))
    actions = [
        WriteSpec(spec=ModelSpec(model=name, created_ms=1), reason="now") for name in ("a", "b")
    ]
    with pytest.raises(LeadershipLostError):
        await actor.carry_out(actions)
    assert (await registry.replicas.snapshot("a")).authoritative
    assert not (await registry.replicas.snapshot("b")).authoritative


async def test_redis_away_means_stepping_down_and_back_means_election(
    settings: ControllerSettings, server: RedisServer, registry: Registry
) -> None:
    """While Redis is frozen nobody leads; once it is back somebody does, and the work goes on."""
    async with running(settings, "c1") as controller, obeying(settings, "h0"):
        await wait_until(controller.leader.reign)
        server.send_signal(signal.SIGSTOP)
        try:
            await wait_until(lambda: controller.leader.reign() is None)
        finally:
            server.send_signal(signal.SIGCONT)
        await wait_until(controller.leader.reign)
        assert await registry.fleet.declare("m", declared(), 0)

        async def serves() -> bool:
            return len(await ready(registry)) == 1

        await wait_until(serves)


async def test_a_whole_reading_holds_what_was_written(registry: Registry) -> None:
    """What is declared, recorded, ordered, held and heard stands in the world that is observed."""
    reply = await registry.leadership.try_lead("c1", 5000)
    assert not isinstance(reply, Following)
    fence = Fence(reply.epoch, "c1")
    await registry.fleet.declare("m", declared(), 0)
    await registry.fleet.put_host(host("h0"))
    await registry.fleet.put_hold(Hold(subject="host:h1", drain=False, since_ms=5))
    actor = acting(registry, fence)
    first = await observe(registry, FixedProber(), settled=True)
    await actor.carry_out(plan(first))
    world = await observe(registry, FixedProber(), settled=True)
    assert world.models["m"].spec.desired_replicas == 1
    assert world.hosts == {"h0": host("h0")}
    assert set(world.holds) == {"host:h1"}
    assert not world.agent_alive("h0")


async def test_corrupt_content_is_named_and_hurts_nobody(
    registry: Registry, server: RedisServer
) -> None:
    """Foreign content in our keys is left out of the world and named in it."""
    await registry.fleet.declare("m", declared(), 0)
    server.command("HSET", "redmesh:{ctl}:deployments", "bad", "{")
    server.command("HSET", "redmesh:{ctl}:hosts", "h9", "[]")
    server.command("HSET", "redmesh:{m}:replicas", "m-x", "nonsense")
    world = await observe(registry, FixedProber(), settled=True)
    assert set(world.models) == {"m"}
    assert world.corrupt == {
        "redmesh:{ctl}:deployments": {"bad"},
        "redmesh:{ctl}:hosts": {"h9"},
        "redmesh:{m}:replicas": {"m-x"},
    }
    plan(world)


async def test_a_spec_survives_its_hash() -> None:
    """What is written of a routing spec reads back as the same spec."""
    spec = ModelSpec(
        model="m",
        aliases=("a/b", "c"),
        generation=3,
        desired_replicas=2,
        request_timeout_s=1.5,
        created_ms=1_700_000_000_000,
    )
    assert parse_spec("m", spec_fields(spec)) == spec


async def test_reservations_of_a_dead_proxy_are_dropped(registry: Registry) -> None:
    """A proxy that beats no more loses what it held, in two looks, and an event tells it."""
    await registry.fleet.declare("m", declared(), 0)
    running = Replica(
        rid="m-1", model="m", gen=1, state=ReplicaState.READY, host="h0", revision="abc"
    )
    await registry.replicas.register(running)
    await registry.ledger.beat("m", "px-dead")
    await registry.ledger.batch("m", "px-dead", [Reserve("r1", 10, 1)])
    assert await registry.ledger.leases("m", "px-dead")
    actor = acting(registry, Fence(1, "c1"))

    async def reaped() -> bool:
        await reap_dead_proxies(registry.ledger, actor, ["m"])
        return "ProxyReaped" in await kinds(registry)

    await wait_until(reaped, timeout_s=15, interval_s=0.5)
    assert not await registry.ledger.leases("m", "px-dead")
    assert not await registry.ledger.proxies("m")


async def test_the_same_trouble_is_told_once(registry: Registry) -> None:
    """A report that repeats itself each second is one event until it changes or grows old."""
    clock = ManualClock()
    log = EventLog(registry.fleet, clock, "controller/c1")
    world = await observe(registry, FixedProber(), settled=True)
    assert not world.models
    for message in ("full", "full", "gone", "full"):
        await log.emit_once(Fence(1, "c1"), tell("Unplaceable", "deployment/m", message))
    assert [e.message for e in await registry.fleet.events(10)] == ["full", "gone", "full"]
    clock.advance(601)
    await log.emit_once(Fence(1, "c1"), tell("Unplaceable", "deployment/m", "full"))
    assert len(await registry.fleet.events(10)) == 4


_START = """
import asyncio, os, sys
from services.controller.main import run
from services.controller.settings import ControllerSettings
from shared import settings
sys.exit(asyncio.run(run(settings.load(ControllerSettings, os.environ))))
"""


def start(settings: ControllerSettings, name: str) -> "subprocess.Popen[bytes]":
    """Start a controller as a process of its own."""
    environ = {
        **os.environ,
        "REDMESH_REDIS_URL": settings.redis_url.reveal(),
        "REDMESH_CONTROLLER_NAME": name,
        "REDMESH_LEASE_TTL_MS": str(settings.lease_ttl_ms),
    }
    return subprocess.Popen([sys.executable, "-c", _START], env=environ)


async def test_processes_take_over_from_a_frozen_leader_and_end_cleanly(
    settings: ControllerSettings, registry: Registry
) -> None:
    """A leader process that is stopped is followed; awake again, it stands by; SIGTERM ends both.

    The one that leads at the end gives its lease back, so that nobody has to wait for its end.
    """
    settings = msgspec.structs.replace(settings, lease_ttl_ms=5_000)
    processes = {name: start(settings, name) for name in ("ca", "cb")}

    async def leader() -> str:
        events = await registry.fleet.events(100)
        elected = [event.subject for event in events if event.kind == "LeaderElected"]
        return elected[-1] if elected else ""

    try:
        await wait_until(lambda: _controllers(registry, 2), timeout_s=30)
        await wait_until(leader, timeout_s=30)
        first = await leader()
        frozen = processes[first.removeprefix("controller/")[:2]]
        frozen.send_signal(signal.SIGSTOP)
        frozen_s = time.monotonic()

        async def followed() -> bool:
            return await leader() != first

        await wait_until(followed, interval_s=0.01)
        assert time.monotonic() - frozen_s < 1.5 * 5
        frozen.send_signal(signal.SIGCONT)
    finally:
        for process in processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        codes = [await asyncio.to_thread(p.wait, 30) for p in processes.values()]
    assert codes == [0, 0]
    assert isinstance(await registry.leadership.try_lead("observer", 1000), Leading)
    assert not await _controllers(registry, 1)


async def _controllers(registry: Registry, count: int) -> bool:
    members = await registry.fleet.members()
    return len([m for m in members.values() if m.member.kind is MemberKind.CONTROLLER]) >= count


async def test_creating_records_first_and_then_orders(registry: Registry) -> None:
    """A replica's record and its order carry the same name and incarnation."""
    await registry.fleet.declare("m", declared(), 0)
    await registry.fleet.put_host(host("h0"))
    await registry.fleet.beat(
        Member(kind=MemberKind.AGENT, id="h0", host="h0", pid=1, version="0", started_ms=0)
    )
    reply = await registry.leadership.try_lead("c1", 5000)
    assert isinstance(reply, Leading)
    actor = acting(registry, Fence(reply.epoch, "c1"))

    async def created() -> bool:
        actions = plan(await observe(registry, FixedProber(), settled=True))
        await actor.carry_out(actions)
        return any(isinstance(action, CreateReplica) for action in actions)

    await wait_until(created)
    (record,) = (await registry.replicas.snapshot("m")).replicas.values()
    (order,) = (await registry.fleet.orders("h0")).values()
    assert (order.rid, order.gen) == (record.rid, record.gen)
    assert record.state is ReplicaState.PENDING
    assert "on h0" in (await registry.fleet.events(1))[0].message
