"""What to do for each replica: orders × engines × records × time → actions. Pure.

The invariant: **the world is rebuilt from what runs.** The absence of an order, or of everything,
never ends an engine. An engine is ended only on explicit evidence:

- an order for its incarnation says DRAIN or STOP;
- its record, or an order, is of a later incarnation: this one is a zombie;
- its record of the same incarnation has ended (FAILED or STOPPED): the controller has given it
  up and no request will come, so it finishes what it has and stops;
- nothing orders it, nothing records it, and for `orphan_grace_s` the fleet has declared other
  models but not its own: the model was deleted while this agent was away.

While Redis is away only one thing happens: an engine that crashed is restarted by its last order,
as the same incarnation on the same port, so that routing tables that still name it stay true.

Reports to the registry are steps along the table of states, one at a time; the next look decides
the next step, so a lost or refused step is simply seen and taken again.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import msgspec

from shared.models.deployment import EngineKind
from shared.models.order import Order, OrderAction
from shared.models.replica import ENDED, TRANSITIONS, Replica, ReplicaState

S = ReplicaState


class Phase(StrEnum):
    """Where an engine stands, as its own agent sees it."""

    STARTING = "starting"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    STOPPING = "stopping"
    ENDED = "ended"


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    """One engine of this host as reconciling needs it."""

    rid: str
    model: str
    gen: int
    kind: EngineKind
    phase: Phase
    url: str = ""
    pid: int = 0
    reason: str = ""
    wanted_end: bool = False
    """ENDED because we stopped it."""
    clean: bool = False
    """ENDED and nothing of its tree is left."""
    restart_at_s: float = 0.0
    """When a crashed engine may be started again (backoff)."""
    draining_since_s: float | None = None
    drain_timeout_s: float = 0.0
    idle: bool = False
    """Since draining began, the engine and the ledger both showed nothing in flight."""
    orphan_since_s: float | None = None
    """Since when neither an order nor a record nor a declaration knows it."""


class Declared(msgspec.Struct, frozen=True, kw_only=True):
    """Which models the fleet declares; `live` excludes those marked as deleted."""

    live: frozenset[str] = frozenset()
    anything: bool = False


class World(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one decision rests on, read at one time."""

    host: str
    now_s: float
    online: bool
    """Redis answered: orders and records are current. Else they are the last known."""
    orders: Mapping[str, Order]
    engines: Mapping[str, EngineView]
    records: Mapping[str, Replica]
    declared: Declared = Declared()
    accepting: bool = True
    """False while the agent exits: nothing new is started."""
    orphan_grace_s: float = 600.0


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """Start the engine of `order`, or begin to probe its external server."""

    order: Order
    phase: Phase = Phase.STARTING
    """Where to take an external server up, so that an agent's restart changes no state."""


class Drain(msgspec.Struct, frozen=True, kw_only=True):
    """Begin to wait until nothing is in flight."""

    rid: str
    timeout_s: float
    why: str


class Stop(msgspec.Struct, frozen=True, kw_only=True):
    """End the engine now: SIGTERM with its timeout, then SIGKILL."""

    rid: str
    why: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Write one step of the replica's state to the registry."""

    rid: str
    model: str
    gen: int
    expect: ReplicaState
    to: ReplicaState
    reason: str = ""


class Amend(msgspec.Struct, frozen=True, kw_only=True):
    """Correct url and pid of the record: the engine was restarted while Redis was away."""

    rid: str


class Register(msgspec.Struct, frozen=True, kw_only=True):
    """Write the record anew: the data were lost, the engine was not."""

    rid: str


class Orphan(msgspec.Struct, frozen=True, kw_only=True):
    """Note that nothing knows the engine (`orphan`), or that something does again."""

    rid: str
    orphan: bool


class Forget(msgspec.Struct, frozen=True, kw_only=True):
    """Drop an ended engine: its end is known to all who need to know."""

    rid: str


Action = Start | Drain | Stop | Report | Amend | Register | Orphan | Forget

GIVEN_UP_DRAIN_S: Final = 60.0
"""What an engine that the controller gave up may take to finish its requests."""
_TARGET: Final = {
    Phase.STARTING: S.STARTING,
    Phase.READY: S.READY,
    Phase.UNHEALTHY: S.UNHEALTHY,
}
_PHASE: Final = {state: phase for phase, state in _TARGET.items()}


def reconcile(world: World) -> list[Action]:
    """Decide what to do now, replica by replica, in a stable order."""
    actions: list[Action] = []
    for rid in sorted(world.orders.keys() | world.engines.keys()):
        engine, order = world.engines.get(rid), world.orders.get(rid)
        if not world.online:
            actions += _while_away(engine, order, world)
        elif engine is None:
            actions += _without_engine(order, world.records.get(rid), world) if order else []
        else:
            actions += _with_engine(engine, order, world.records.get(rid), world)
    return actions


def next_step(now: ReplicaState, phase_target: ReplicaState) -> ReplicaState | None:
    """Return the next state on the way from `now` to `phase_target`; None to stay.

    DRAINING is the controller's wish and is left only by ending. A record that says READY of an
    engine that is starting again must leave READY first: UNHEALTHY is the way that leads back.
    """
    if now is phase_target or now in ENDED:
        return None
    if phase_target in TRANSITIONS[now]:
        return phase_target
    detours = {
        (S.PENDING, S.READY): S.STARTING,
        (S.PENDING, S.UNHEALTHY): S.STARTING,
        (S.PENDING, S.STOPPED): S.FAILED,
        (S.READY, S.STARTING): S.UNHEALTHY,
        (S.STARTING, S.STOPPED): S.DRAINING,
        (S.READY, S.STOPPED): S.DRAINING,
        (S.UNHEALTHY, S.STOPPED): S.DRAINING,
        (S.PENDING, S.DRAINING): S.STARTING,
    }
    return detours.get((now, phase_target))


def _while_away(engine: EngineView | None, order: Order | None, world: World) -> list[Action]:
    if (
        engine is not None
        and order is not None
        and order.action is OrderAction.RUN
        and order.gen == engine.gen
        and engine.phase is Phase.ENDED
        and engine.clean
        and not engine.wanted_end
        and world.accepting
        and world.now_s >= engine.restart_at_s
    ):
        return [Start(order=order)]
    return []


def _without_engine(order: Order, record: Replica | None, world: World) -> list[Action]:
    if record is None or record.gen != order.gen or record.host != world.host:
        return []
    if record.state in ENDED:
        return []
    if order.action is OrderAction.RUN:
        if record.state is S.PENDING:
            return [Start(order=order)] if world.accepting else []
        if order.spec.engine.kind is EngineKind.EXTERNAL and record.state is not S.DRAINING:
            return [Start(order=order, phase=_PHASE[record.state])]
        if record.state is not S.DRAINING:
            return [_report(order, record, S.FAILED, "no process of this engine is on its host")]
    step = next_step(record.state, S.STOPPED)
    return [] if step is None else [_report(order, record, step, "nothing ran any more")]


def _with_engine(
    engine: EngineView, order: Order | None, record: Replica | None, world: World
) -> list[Action]:
    if order is not None and order.gen < engine.gen:
        order = None  # left over from an earlier incarnation
    latest = max(order.gen if order else 0, record.gen if record else 0)
    if latest > engine.gen:
        return _end(engine, Stop(rid=engine.rid, why="a later incarnation replaces it"), world)
    if record is None:
        return _unrecorded(engine, order, world)
    known: list[Action] = _known_again(engine)
    if record.state in ENDED:
        wish = Drain(
            rid=engine.rid, timeout_s=GIVEN_UP_DRAIN_S, why=f"its record is {record.state}"
        )
        return known + _end(engine, wish, world)
    return known + _recorded(engine, order, record, world)


def _recorded(
    engine: EngineView, order: Order | None, record: Replica, world: World
) -> list[Action]:
    if engine.phase is Phase.ENDED:
        return _step(engine, record, S.STOPPED if engine.wanted_end else S.FAILED)
    if engine.phase is Phase.STOPPING:
        return _step(engine, record, S.DRAINING)
    wish = _wish(engine, order)
    if wish is None and order is None and record.state is S.DRAINING:
        wish = Drain(rid=engine.rid, timeout_s=GIVEN_UP_DRAIN_S, why="its record is DRAINING")
    if wish is not None:
        # Out of `ready` first: only then can "nothing in flight" stay true.
        return _step(engine, record, S.DRAINING) or _end(engine, wish, world)
    moved = record.url != engine.url or record.pid != engine.pid
    amend: list[Action] = [Amend(rid=engine.rid)] if moved and record.state is not S.PENDING else []
    return amend + _step(engine, record, _TARGET[engine.phase])


def _unrecorded(engine: EngineView, order: Order | None, world: World) -> list[Action]:
    wish: Stop | Drain | None = _wish(engine, order)
    if wish is not None or engine.phase in {Phase.ENDED, Phase.STOPPING}:
        return _end(engine, wish or Stop(rid=engine.rid, why="ended"), world)
    if order is not None or engine.model in world.declared.live or not world.declared.anything:
        # A starting engine too: its place is taken, and no other must be started instead of it.
        return [*_known_again(engine), Register(rid=engine.rid)]
    if engine.orphan_since_s is None:
        return [Orphan(rid=engine.rid, orphan=True)]
    if world.now_s - engine.orphan_since_s < world.orphan_grace_s:
        return []
    why = "nothing orders, records or declares it"
    return _end(engine, Drain(rid=engine.rid, timeout_s=GIVEN_UP_DRAIN_S, why=why), world)


def _known_again(engine: EngineView) -> list[Action]:
    return [] if engine.orphan_since_s is None else [Orphan(rid=engine.rid, orphan=False)]


def _wish(engine: EngineView, order: Order | None) -> Stop | Drain | None:
    if order is None or order.action is OrderAction.RUN:
        return None
    if order.action is OrderAction.STOP:
        return Stop(rid=engine.rid, why="ordered")
    return Drain(rid=engine.rid, timeout_s=order.drain_timeout_s, why="ordered")


def _end(engine: EngineView, wish: Stop | Drain, world: World) -> list[Action]:
    if engine.phase is Phase.ENDED:
        return [Forget(rid=engine.rid)] if engine.clean else []
    if engine.phase is Phase.STOPPING:
        return []
    if isinstance(wish, Stop) or engine.draining_since_s is None:
        return [wish]
    if engine.idle:
        return [Stop(rid=engine.rid, why=f"drained ({wish.why})")]
    if world.now_s - engine.draining_since_s >= engine.drain_timeout_s:
        return [Stop(rid=engine.rid, why=f"the drain's deadline is over ({wish.why})")]
    return []


def _step(engine: EngineView, record: Replica, target: ReplicaState) -> list[Action]:
    to = next_step(record.state, target)
    if to is None:
        return []
    return [
        Report(
            rid=engine.rid,
            model=engine.model,
            gen=engine.gen,
            expect=record.state,
            to=to,
            reason=engine.reason,
        )
    ]


def _report(order: Order, record: Replica, to: ReplicaState, reason: str) -> Report:
    return Report(
        rid=order.rid,
        model=order.model,
        gen=order.gen,
        expect=record.state,
        to=to,
        reason=reason,
    )
