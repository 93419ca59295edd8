"""What the agent decides, case by case: ended on evidence only, reported one step at a time."""

from collections.abc import Mapping
from typing import Final, TypeVar

import msgspec
import pytest

from services.agent.reconcile import (
    Amend,
    Declared,
    Drain,
    EngineView,
    Forget,
    Orphan,
    Phase,
    Register,
    Report,
    Start,
    Stop,
    World,
    next_step,
    reconcile,
)
from shared.models.deployment import DeploymentSpec, EngineKind, EngineSpec
from shared.models.order import Order, OrderAction
from shared.models.replica import ENDED, TRANSITIONS, Replica, ReplicaState

T = TypeVar("T")
S = ReplicaState
SPEC = DeploymentSpec(name="m", engine=EngineSpec(kind=EngineKind.SIM))
ORDER = Order(
    rid="r", model="m", gen=5, action=OrderAction.RUN, revision="v", spec=SPEC, drain_timeout_s=9
)
DRAIN = msgspec.structs.replace(ORDER, action=OrderAction.DRAIN)
STOP = msgspec.structs.replace(ORDER, action=OrderAction.STOP)
ENGINE = EngineView(
    rid="r", model="m", gen=5, kind=EngineKind.SIM, phase=Phase.READY, url="u", pid=3
)
RECORD = Replica(rid="r", model="m", gen=5, state=S.READY, host="h", revision="v", url="u", pid=3)
CRASHED = msgspec.structs.replace(ENGINE, phase=Phase.ENDED, reason="killed", clean=True)
STOPPED = msgspec.structs.replace(CRASHED, wanted_end=True, reason="ordered")
ALIVE: Final = (Phase.STARTING, Phase.READY, Phase.UNHEALTHY)


def decide(
    order: Order | None = None,
    engine: EngineView | None = None,
    record: Replica | None = None,
    *,
    online: bool = True,
    accepting: bool = True,
    declared: Declared | None = None,
    now_s: float = 100.0,
) -> list[object]:
    """Decide for one replica."""
    return list(
        reconcile(
            World(
                host="h",
                now_s=now_s,
                online=online,
                orders=_one(order),
                engines=_one(engine),
                records=_one(record),
                declared=declared or Declared(),
                accepting=accepting,
                orphan_grace_s=60.0,
            )
        )
    )


def _one(value: T | None) -> Mapping[str, T]:
    return {} if value is None else {"r": value}


def at(state: S, gen: int = 5) -> Replica:
    """Give the record in `state`."""
    return msgspec.structs.replace(RECORD, state=state, gen=gen)


def in_phase(phase: Phase) -> EngineView:
    """Give the engine in `phase`."""
    return msgspec.structs.replace(ENGINE, phase=phase)


def report(expect: S, to: S, reason: str = "") -> Report:
    """Give the step that is expected."""
    return Report(rid="r", model="m", gen=5, expect=expect, to=to, reason=reason)


def test_pending_replica_is_started() -> None:
    """RUN with a PENDING record and no engine starts one; an agent that exits starts none."""
    assert decide(ORDER, None, at(S.PENDING)) == [Start(order=ORDER)]
    assert decide(ORDER, None, at(S.PENDING), accepting=False) == []


@pytest.mark.parametrize("record", [None, at(S.PENDING, gen=6), at(S.FAILED), at(S.STOPPED)])
def test_nothing_starts_without_a_fitting_record(record: Replica | None) -> None:
    """An order whose record is gone, of another incarnation or ended starts nothing."""
    assert decide(ORDER, None, record) == []


def test_record_of_another_host_is_not_ours() -> None:
    """A record that names another host is left alone."""
    other = msgspec.structs.replace(at(S.READY), host="else")
    assert decide(ORDER, None, other) == []


@pytest.mark.parametrize("state", [S.STARTING, S.READY, S.UNHEALTHY])
def test_record_without_engine_fails(state: S) -> None:
    """A record that claims an engine which its host does not have becomes FAILED."""
    (action,) = decide(ORDER, None, at(state))
    assert isinstance(action, Report)
    assert action.to is S.FAILED


def test_external_server_is_taken_up_where_it_stood() -> None:
    """After an agent's restart an external server keeps its state."""
    spec = DeploymentSpec(name="m", engine=EngineSpec(kind=EngineKind.EXTERNAL))
    order = msgspec.structs.replace(ORDER, spec=spec)
    assert decide(order, None, at(S.READY)) == [Start(order=order, phase=Phase.READY)]
    assert decide(order, None, at(S.UNHEALTHY)) == [Start(order=order, phase=Phase.UNHEALTHY)]


@pytest.mark.parametrize(
    ("phase", "state", "to"),
    [
        (Phase.STARTING, S.PENDING, S.STARTING),
        (Phase.READY, S.PENDING, S.STARTING),
        (Phase.READY, S.STARTING, S.READY),
        (Phase.UNHEALTHY, S.READY, S.UNHEALTHY),
        (Phase.READY, S.UNHEALTHY, S.READY),
        (Phase.STARTING, S.READY, S.UNHEALTHY),
        (Phase.STARTING, S.UNHEALTHY, None),
        (Phase.STARTING, S.STARTING, None),
        (Phase.READY, S.READY, None),
        (Phase.READY, S.DRAINING, None),
    ],
)
def test_record_follows_the_engine(phase: Phase, state: S, to: S | None) -> None:
    """A living engine's record moves towards its phase, one legal step at a time."""
    expected = [] if to is None else [report(state, to)]
    assert decide(ORDER, in_phase(phase), at(state)) == expected


@pytest.mark.parametrize("state", [s for s in S if s not in ENDED])
def test_dead_engine_is_failed_from_every_state(state: S) -> None:
    """An engine that ended against our will is FAILED in one step, with its reason."""
    assert decide(ORDER, CRASHED, at(state)) == [report(state, S.FAILED, "killed")]


def test_reported_end_is_forgotten_once_clean() -> None:
    """An end that Redis knows, or nobody asks for, is forgotten when nothing is left of it."""
    assert decide(ORDER, CRASHED, at(S.FAILED)) == [Forget(rid="r")]
    assert decide(None, CRASHED, None) == [Forget(rid="r")]
    dirty = msgspec.structs.replace(CRASHED, clean=False)
    assert decide(ORDER, dirty, at(S.FAILED)) == []


def test_drain_leaves_ready_first_then_waits_then_stops() -> None:
    """DRAIN: out of READY, wait until idle or the deadline, stop, STOPPED."""
    assert decide(DRAIN, ENGINE, at(S.READY)) == [report(S.READY, S.DRAINING)]
    assert decide(DRAIN, ENGINE, at(S.DRAINING)) == [Drain(rid="r", timeout_s=9, why="ordered")]
    waiting = msgspec.structs.replace(ENGINE, draining_since_s=95.0, drain_timeout_s=9.0)
    assert decide(DRAIN, waiting, at(S.DRAINING)) == []
    idle = msgspec.structs.replace(waiting, idle=True)
    assert isinstance(decide(DRAIN, idle, at(S.DRAINING))[0], Stop)
    assert isinstance(decide(DRAIN, waiting, at(S.DRAINING), now_s=104.0)[0], Stop)
    stopping = msgspec.structs.replace(ENGINE, phase=Phase.STOPPING)
    assert decide(DRAIN, stopping, at(S.DRAINING)) == []
    assert decide(DRAIN, STOPPED, at(S.DRAINING)) == [report(S.DRAINING, S.STOPPED, "ordered")]


def test_stop_leaves_ready_first() -> None:
    """STOP: out of READY before the engine is ended, so that nobody is sent to a closing door."""
    assert decide(STOP, ENGINE, at(S.READY)) == [report(S.READY, S.DRAINING)]
    assert decide(STOP, ENGINE, at(S.DRAINING)) == [Stop(rid="r", why="ordered")]


@pytest.mark.parametrize("phase", ALIVE)
@pytest.mark.parametrize("record", [None, RECORD])
@pytest.mark.parametrize("declared", [Declared(), Declared(live=frozenset("m"), anything=True)])
def test_absence_of_an_order_never_ends_an_engine(
    phase: Phase, record: Replica | None, declared: Declared
) -> None:
    """Without an order, with or without a record, a declared or unknown engine goes on."""
    actions = decide(None, in_phase(phase), record, declared=declared)
    assert not [action for action in actions if isinstance(action, (Stop, Drain))]


def test_lost_record_is_registered_again() -> None:
    """An engine that runs writes its record anew, and so does one that starts: it has a place."""
    assert decide(ORDER, ENGINE, None) == [Register(rid="r")]
    assert decide(None, ENGINE, None) == [Register(rid="r")]
    assert decide(ORDER, in_phase(Phase.STARTING), None) == [Register(rid="r")]


def test_engine_of_a_deleted_model_ends_after_its_grace() -> None:
    """Others are declared and this model is not: it is kept for the grace, then drained."""
    others = Declared(live=frozenset({"other"}), anything=True)
    assert decide(None, ENGINE, None, declared=others) == [Orphan(rid="r", orphan=True)]
    orphan = msgspec.structs.replace(ENGINE, orphan_since_s=0.0)
    assert decide(None, orphan, None, declared=others, now_s=59) == []
    assert isinstance(decide(None, orphan, None, declared=others, now_s=61)[0], Drain)
    assert Orphan(rid="r", orphan=False) in decide(None, orphan, RECORD, declared=others)


def test_zombie_is_stopped_by_a_later_incarnation() -> None:
    """A record or an order of a later incarnation ends this engine; its end is not reported."""
    assert isinstance(decide(ORDER, ENGINE, at(S.PENDING, gen=6))[0], Stop)
    later = msgspec.structs.replace(ORDER, gen=6)
    assert isinstance(decide(later, ENGINE, None)[0], Stop)
    assert decide(later, CRASHED, at(S.PENDING, gen=6)) == [Forget(rid="r")]


def test_order_of_an_earlier_incarnation_is_void() -> None:
    """A STOP that was meant for an earlier incarnation does not end this one."""
    earlier = msgspec.structs.replace(STOP, gen=4)
    assert decide(earlier, ENGINE, RECORD) == []


@pytest.mark.parametrize("state", sorted(ENDED))
def test_engine_that_was_given_up_finishes_and_ends(state: S) -> None:
    """A record that ended while its engine runs drains the engine: no request will come."""
    assert isinstance(decide(ORDER, ENGINE, at(state))[0], Drain)


def test_moved_engine_corrects_its_record() -> None:
    """An engine that was restarted while Redis was away corrects url and pid."""
    moved = msgspec.structs.replace(ENGINE, pid=4)
    assert decide(ORDER, moved, RECORD) == [Amend(rid="r")]


def test_without_redis_only_crashes_are_mended() -> None:
    """Away: nothing is stopped, drained or reported; a crashed engine restarts when it is due."""
    assert decide(STOP, ENGINE, RECORD, online=False) == []
    assert decide(ORDER, None, at(S.PENDING), online=False) == []
    assert decide(ORDER, CRASHED, RECORD, online=False) == [Start(order=ORDER)]
    later = msgspec.structs.replace(CRASHED, restart_at_s=101.0)
    assert decide(ORDER, later, RECORD, online=False) == []
    dirty = msgspec.structs.replace(CRASHED, clean=False)
    assert decide(ORDER, dirty, RECORD, online=False) == []
    assert decide(DRAIN, CRASHED, RECORD, online=False) == []
    assert decide(ORDER, STOPPED, RECORD, online=False) == []


@pytest.mark.parametrize("now", list(S))
@pytest.mark.parametrize("target", [s for s in S if s is not S.PENDING])
def test_every_step_is_legal_and_leads_on(now: S, target: S) -> None:
    """Each step is in the table of states, and following the steps ends, never in a circle."""
    seen = [now]
    while (step := next_step(seen[-1], target)) is not None:
        assert step in TRANSITIONS[seen[-1]]
        assert step not in seen
        seen.append(step)
