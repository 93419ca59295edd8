"""A tour that runs every script, and a connection that remembers what ran and what it answered."""

from collections.abc import Sequence
from typing import Any

import msgspec

from shared.models.deployment import Deployment, DeploymentSpec
from shared.models.drill import DrillAct, DrillWish, Production
from shared.models.event import Event
from shared.models.host import Host, Member, MemberKind
from shared.models.order import Order, OrderAction
from shared.models.replica import Replica, ReplicaState
from shared.models.routing import ModelSpec
from shared.registry import Registry
from shared.registry.connection import Argument, Connection
from shared.registry.leadership import Leading
from shared.registry.ledger import Adopt, Release, Reserve
from shared.registry.loader import ScriptSpec
from shared.registry.replicas import ReplicaBeat
from shared.registry.results import Fence, Refused, Written
from shared.registry.specs import spec_fields
from shared.registry.streams import Append, Asked, StreamState, Writer

MODEL = "llama3:8b"
STREAM = "0123456789abcdef" * 2
ASKED = Asked(model=MODEL, path="/v1/completions", body=b"{}", request_id="r", owner="0" * 64)
ROUTING = ModelSpec(model=MODEL, generation=1, desired_replicas=2)
DEPLOYMENT = Deployment(spec=DeploymentSpec(name=MODEL), generation=1, replicas=2)


class Call:
    """One script that ran."""

    def __init__(
        self,
        script: ScriptSpec,
        keys: Sequence[str | bytes],
        args: Sequence[Argument],
        reply: list[Any],
    ) -> None:
        self.script = script
        self.keys = tuple(keys)
        self.args = tuple(args)
        self.reply: list[Any] = reply


class Recorder(Connection):
    """A connection that remembers every script it ran."""

    calls: list[Call]

    @classmethod
    def over(cls, connection: Connection) -> "Recorder":
        """Share the client of `connection`."""
        recorder = cls.__new__(cls)
        recorder.__dict__.update(connection.__dict__)
        recorder.calls = []
        return recorder

    async def evalsha(
        self, script: ScriptSpec, keys: Sequence[str | bytes], args: Sequence[Argument]
    ) -> Any:  # noqa: ANN401 - any reply
        """Run and remember."""
        reply = await super().evalsha(script, keys, args)
        self.calls.append(Call(script, keys, args, reply))
        return reply


def replica(rid: str, **fields: object) -> Replica:
    """Make a PENDING record."""
    values = {"model": MODEL, "gen": 7, "state": "PENDING", "host": "h1", "revision": "abc"}
    return msgspec.convert({**values, "rid": rid, **fields}, type=Replica)


async def lead(registry: Registry, owner: str = "c1") -> Fence:
    """Become leader."""
    leading = await registry.leadership.try_lead(owner)
    assert isinstance(leading, Leading)
    return Fence(leading.epoch, owner)


async def make_ready(registry: Registry, fence: Fence, *rids: str, **fields: object) -> None:
    """Create replicas and bring them to READY."""
    for rid in rids:
        record = replica(rid, **fields)
        assert isinstance(await registry.replicas.create(fence, record), Written)
        await move(registry, rid, ReplicaState.PENDING, ReplicaState.STARTING, model=record.model)
        await move(registry, rid, ReplicaState.STARTING, ReplicaState.READY, model=record.model)


async def move(
    registry: Registry,
    rid: str,
    expect: ReplicaState,
    to: ReplicaState,
    *,
    gen: int = 7,
    model: str = MODEL,
    fence: Fence | None = None,
) -> Written | Refused:
    """Make one transition."""
    return await registry.replicas.transition(
        rid, model, gen=gen, expect=expect, to=to, fence=fence
    )


async def tour(registry: Registry) -> None:
    """Run every script at least once, the way the services do, and leave things in use."""
    fence = await lead(registry)
    await registry.leadership.try_lead("c2")
    assert await registry.fleet.declare(MODEL, DEPLOYMENT, 0)
    await registry.specs.write(fence, MODEL, spec_fields(ROUTING))
    await make_ready(registry, fence, "r1", "r2", "r3")
    await registry.replicas.patch("r1", MODEL, gen=7, patch={"penalty": 5}, fence=fence)
    beats = [ReplicaBeat(rid="r1", gen=7, running=2, kv_usage=0.5)]
    await registry.replicas.heartbeat(MODEL, beats)
    await registry.replicas.pulse(MODEL)
    await registry.replicas.snapshot(MODEL)
    await registry.ledger.beat(MODEL, "p1", 3)
    await registry.ledger.batch(
        MODEL, "p1", [Reserve("a", 9, 0), Reserve("b", 9, 1), Release("b"), Adopt("c", "r2", 4)]
    )
    await registry.ledger.suspects(MODEL)
    await registry.ledger.reap(MODEL, "p1")
    await registry.ledger.reap(MODEL, "p0")
    await registry.ledger.totals(MODEL)
    await registry.ledger.proxies(MODEL)
    await registry.ledger.books(MODEL, ("p1",))
    await registry.ledger.recount(MODEL, ("p0",))
    await move(registry, "r3", ReplicaState.READY, ReplicaState.FAILED)
    await registry.replicas.delete(fence, MODEL, "r3", 7)
    await registry.specs.forget(fence, MODEL)
    order = Order(
        rid="r1",
        model=MODEL,
        gen=7,
        action=OrderAction.RUN,
        revision="abc",
        spec=DEPLOYMENT.spec,
    )
    await registry.fleet.put_host(Host(host="h1", address="127.0.0.1", cpus=2, memory_bytes=1))
    await registry.fleet.put_order(fence, "h1", order)
    await registry.fleet.orders("h1")
    member = Member(kind=MemberKind.PROXY, id="p1", host="h1", pid=1, version="0", started_ms=1)
    await registry.fleet.beat(member)
    await registry.fleet.members()
    assert not await registry.fleet.set_aside(registry.keys.fleet.members, "hash")
    await registry.fleet.forget_deployment(fence, MODEL)
    await registry.fleet.forget_host(fence, "h2")
    await registry.fleet.forget_member("proxy:p2")
    await registry.fleet.clear_hold(fence, "replica:r3")
    await registry.fleet.tell(
        fence, Event(kind="Toured", subject=f"deployment/{MODEL}", message="")
    )
    await registry.drills.mark_production(Production(since_ms=1, by="op"))
    assert await registry.drills.wish("h1", DrillWish(id="d", rid="r1", gen=7, act=DrillAct.KILL))
    await streams_tour(registry)
    await registry.leadership.resign("c2")


def writer(proxy: str = "p1", epoch: int = 1, lease_ms: int = 4000) -> Writer:
    """Make the writer of a stream."""
    return Writer(proxy=proxy, epoch=epoch, lease_ms=lease_ms, life_ms=60_000)


async def streams_tour(registry: Registry) -> None:
    """Write a stream, read it, take it over; cancel another."""
    streams, other = registry.streams, STREAM[::-1]
    for stream in (STREAM, other):
        assert await streams.open(stream, writer(), ASKED)
        events = Append(first=1, last=2, events=b"id: 1\n\nid: 2\n\n", tape=b"{}")
        await streams.append(stream, writer(lease_ms=0), events)
        await streams.read(stream, 0)
    await streams.claim(STREAM, writer("p2"))
    await streams.known(STREAM)
    assert not await streams.close(STREAM, StreamState.LOST, writer())
    assert await streams.close(other, StreamState.CANCELLED)
