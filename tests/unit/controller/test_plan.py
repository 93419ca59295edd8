import itertools
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.controller.actions import (
    Action,
    CreateReplica,
    DropHold,
    DropOrder,
    ForgetHost,
    ForgetMember,
    ForgetModel,
    Move,
    PatchReplica,
    PutOrder,
    Report,
    WriteSpec,
)
from services.controller.plan import plan
from shared.models.deployment import EngineKind, ReplicaBounds, RoutingSpec
from shared.models.host import Hold
from shared.models.order import Order, OrderAction
from shared.models.replica import Replica, ReplicaState
from tests.unit.controller.fleet import Fleet, declared, host


def run(fleet: Fleet, ticks: int = 40) -> None:
    """Plan and obey for `ticks` seconds."""
    for _ in range(ticks):
        fleet.apply(plan(fleet.world()))
        fleet.step()


def only(actions: list[Action], kind: type[Action]) -> list[Action]:
    """Pick the actions of one kind."""
    return [action for action in actions if isinstance(action, kind)]


def serving(replicas: int = 2, hosts: int = 2) -> Fleet:
    """Make a fleet that has come to rest with its replicas READY."""
    fleet = Fleet([host(f"h{i}") for i in range(hosts)], [declared(replicas=replicas)])
    run(fleet)
    assert len(fleet.ready()) == replicas
    assert plan(fleet.world()) == []
    return fleet


def test_a_declared_deployment_is_served() -> None:
    """From nothing but a declaration and hosts the plan reaches the wanted replicas and rests."""
    fleet = serving(replicas=3)
    assert sorted(r.host for r in fleet.ready()) in (["h0", "h0", "h1"], ["h0", "h1", "h1"])


def test_the_routing_spec_is_written_before_anything_else() -> None:
    """A model nobody has led yet gets its routing spec first, and nothing more in that plan."""
    fleet = Fleet([host("h0")], [declared()])
    (action,) = plan(fleet.world())
    assert isinstance(action, WriteSpec)
    assert action.spec.desired_replicas == 1


def test_new_data_is_given_time_to_be_registered() -> None:
    """Right after a model's data began nothing is created: agents may still register what runs."""
    fleet = Fleet([host("h0")], [declared()])
    fleet.apply(plan(fleet.world()))
    assert plan(fleet.world()) == []
    fleet.step(2.0)
    assert only(plan(fleet.world()), CreateReplica)


def test_scaling_up_adds_what_is_missing_at_once() -> None:
    """Scaling from 2 to 5 creates three replicas in one plan."""
    fleet = serving()
    fleet.declare(declared(replicas=5))
    assert len(only(plan(fleet.world()), CreateReplica)) == 3


def test_scaling_down_takes_the_least_loaded_and_drains_it() -> None:
    """Of equally healthy replicas the one with the least outstanding cost is drained."""
    fleet = serving(replicas=3)
    busy = [replica.rid for replica in fleet.ready()][:2]
    fleet.load = dict.fromkeys(busy, 500)
    fleet.declare(declared(replicas=2))
    (move,) = only(plan(fleet.world()), Move)
    assert isinstance(move, Move)
    assert move.replica.rid not in busy
    assert move.to is ReplicaState.DRAINING
    assert move.order is not None
    assert move.order.action is OrderAction.DRAIN


def test_scaling_down_prefers_unhealthy_ones() -> None:
    """An unhealthy replica goes before any that serves, however little that one has to do."""
    fleet = serving(replicas=3)
    sick = fleet.ready()[0]
    fleet.load = {sick.rid: 900}
    fleet.move(sick, ReplicaState.UNHEALTHY, "probe failed")
    fleet.declare(declared(replicas=2))
    (move,) = only(plan(fleet.world()), Move)
    assert isinstance(move, Move)
    assert move.replica.rid == sick.rid


def test_a_failed_replica_is_replaced_after_its_pause() -> None:
    """A replica that its agent reported FAILED has a successor one second later, not before."""
    fleet = serving()
    fleet.move(fleet.ready()[0], ReplicaState.FAILED, "exit code -9")
    assert not only(plan(fleet.world()), CreateReplica)
    fleet.step()
    assert len(only(plan(fleet.world()), CreateReplica)) == 1
    run(fleet, 5)
    assert len(fleet.ready()) == 2


def test_failures_are_forgotten_after_five_good_minutes() -> None:
    """Once the wanted replicas have been READY for five minutes, old failures are removed."""
    fleet = serving()
    fleet.move(fleet.ready()[0], ReplicaState.FAILED, "exit code -9")
    run(fleet, 30)
    assert any(r.state is ReplicaState.FAILED for r in fleet.all_replicas())
    fleet.step(300)
    run(fleet, 2)
    assert len(fleet.all_replicas()) == 2


def test_a_crash_loop_slows_down_and_says_why() -> None:
    """What never starts is tried ever more rarely, and operators read the cause."""
    fleet = Fleet([host("h0")], [declared()])
    fleet.broken.add(declared().spec.revision())
    created: list[int] = []
    messages: set[str] = set()
    for second in range(300):
        actions = plan(fleet.world())
        created += [second] * len(only(actions, CreateReplica))
        messages |= {a.event.message for a in only(actions, Report) if a.event is not None}
        fleet.apply(actions)
        fleet.step()
    gaps = [after - before for before, after in itertools.pairwise(created)]
    assert gaps[:3] == sorted(gaps[:3])
    assert max(gaps) >= 60
    assert len(created) <= 10
    assert any("exit code 1" in message for message in messages)
    assert len(fleet.all_replicas()) <= 10


def test_a_mended_revision_does_not_wait_for_the_old_ones_failures() -> None:
    """A new revision starts at once, whatever the pause of the old one is."""
    fleet = Fleet([host("h0")], [declared()])
    fleet.broken.add(declared().spec.revision())
    run(fleet, 100)
    fleet.declare(declared(dtype="float32"))
    run(fleet, 5)
    assert len(fleet.ready()) == 1


def test_a_rollout_surges_by_one_and_never_serves_with_less() -> None:
    """While rolling, READY never falls below the wanted number and at most one more lives."""
    fleet = serving(replicas=3)
    fleet.declare(declared(replicas=3, dtype="float32"))
    revision = declared(dtype="float32").spec.revision()
    for _ in range(40):
        fleet.apply(plan(fleet.world()))
        assert len(fleet.ready()) >= 3
        assert len(fleet.living()) <= 4
        fleet.step()
    assert {r.revision for r in fleet.all_replicas()} == {revision}
    assert plan(fleet.world()) == []


def test_a_rollout_that_cannot_start_leaves_the_old_ones_serving() -> None:
    """A revision whose engines fail never costs a READY replica of the old one."""
    fleet = serving(replicas=2)
    fleet.declare(declared(replicas=2, dtype="bad"))
    fleet.broken.add(declared(dtype="bad").spec.revision())
    for _ in range(60):
        fleet.apply(plan(fleet.world()))
        assert len(fleet.ready()) == 2
        fleet.step()


def test_a_rollout_without_room_waits_and_says_so() -> None:
    """Without room for the surge nothing is drained, and an event names what is missing."""
    fleet = Fleet([host("h0", max_replicas=1)], [declared()])
    run(fleet)
    fleet.declare(declared(dtype="float32"))
    fleet.apply(plan(fleet.world()))
    (report,) = only(plan(fleet.world()), Report)
    assert report.event is not None
    assert report.event.kind == "Unplaceable"
    assert "h0: full (1 of 1 replicas)" in report.event.message
    assert len(fleet.ready()) == 1


def test_a_drained_host_is_emptied_after_its_replacements_are_ready() -> None:
    """Draining a host moves its replicas away one by one without a gap, and places none there."""
    fleet = serving(replicas=2)
    fleet.holds["host:h0"] = Hold(subject="host:h0", drain=True, since_ms=0)
    for _ in range(30):
        fleet.apply(plan(fleet.world()))
        assert len(fleet.ready()) >= 2
        fleet.step()
    assert {r.host for r in fleet.all_replicas()} == {"h1"}


def test_a_cordoned_host_keeps_what_it_has_and_gets_nothing_new() -> None:
    """A cordon moves nothing away and lets nothing in."""
    fleet = serving(replicas=2)
    fleet.holds["host:h0"] = Hold(subject="host:h0", drain=False, since_ms=0)
    assert plan(fleet.world()) == []
    fleet.declare(declared(replicas=4))
    creates = only(plan(fleet.world()), CreateReplica)
    assert [a.replica.host for a in creates if isinstance(a, CreateReplica)] == ["h1", "h1"]


def test_a_drained_replica_is_replaced_and_its_wish_forgotten() -> None:
    """`redmesh drain` of a replica replaces it first; the hold goes when the replica has gone."""
    fleet = serving(replicas=1)
    old = fleet.ready()[0].rid
    fleet.holds[f"replica:{old}"] = Hold(subject=f"replica:{old}", drain=True, since_ms=0)
    run(fleet, 10)
    assert old not in {r.rid for r in fleet.all_replicas()}
    assert len(fleet.ready()) == 1
    assert not fleet.holds


def test_lost_orders_are_written_again() -> None:
    """A record without its order gets the order that its state calls for."""
    fleet = serving(replicas=2)
    before = {h: dict(orders) for h, orders in fleet.orders.items()}
    fleet.orders.clear()
    actions = plan(fleet.world())
    assert all(isinstance(action, PutOrder) for action in actions)
    fleet.apply(actions)
    assert {h: set(orders) for h, orders in fleet.orders.items()} == {
        h: set(orders) for h, orders in before.items()
    }
    assert plan(fleet.world()) == []


def test_a_lost_spec_is_written_after_agents_had_time_to_register() -> None:
    """A spec says that what is recorded is all there is; a fresh declaration waits for nobody."""
    fleet = serving(replicas=2)
    fleet.specs.clear()
    fleet.settled = False
    assert only(plan(fleet.world()), WriteSpec) == []
    fleet.settled = True
    assert only(plan(fleet.world()), WriteSpec)
    fresh = msgspec.structs.replace(fleet.deployments["m"], updated_ms=fleet.now_ms - 1000)
    fleet.deployments["m"] = fresh
    fleet.settled = False
    assert only(plan(fleet.world()), WriteSpec)


def test_an_order_without_a_record_is_taken_back() -> None:
    """What no record stands behind is not ordered any longer; but not before things settled."""
    fleet = serving(replicas=1)
    spec = fleet.deployments["m"].spec
    stray = Order(rid="m-x", model="m", gen=1, action=OrderAction.RUN, revision="r", spec=spec)
    fleet.put("h0", stray)
    fleet.settled = False
    assert plan(fleet.world()) == []
    fleet.settled = True
    assert plan(fleet.world()) == [
        DropOrder(host="h0", rid="m-x", reason="no record stands behind this order")
    ]


def test_a_changed_request_cap_reaches_running_replicas() -> None:
    """Routing limits are no revision: records are patched and no engine restarts."""
    fleet = serving(replicas=1)
    old = fleet.deployments["m"]
    spec = msgspec.structs.replace(old.spec, routing=RoutingSpec(max_requests_per_replica=7))
    fleet.declare(msgspec.structs.replace(old, spec=spec))
    run(fleet, 2)
    assert [r.max_requests for r in fleet.ready()] == [7]
    assert not only(plan(fleet.world()), PatchReplica)


def test_a_deleted_deployment_is_drained_and_then_forgotten() -> None:
    """Deletion drains every replica; the declaration itself goes last."""
    fleet = serving(replicas=2)
    fleet.declare(msgspec.structs.replace(fleet.deployments["m"], deleted=True))
    first = plan(fleet.world())
    assert {a.to for a in only(first, Move) if isinstance(a, Move)} == {ReplicaState.DRAINING}
    assert not only(first, ForgetModel)
    run(fleet, 10)
    assert not fleet.deployments
    assert not fleet.all_replicas()


def test_a_deleted_deployment_is_remembered_while_a_host_is_silent() -> None:
    """A silent host may come back with an engine of it, which must then still be known."""
    fleet = serving(replicas=1)
    other = "h1" if fleet.ready()[0].host == "h0" else "h0"
    fleet.kill_agent(other)
    fleet.step(11)
    fleet.declare(msgspec.structs.replace(fleet.deployments["m"], deleted=True))
    run(fleet, 30)
    assert "m" in fleet.deployments


def test_surplus_that_registers_again_is_drained() -> None:
    """A replica that was given up and comes back is one too many, and is drained."""
    fleet = serving(replicas=2)
    back = msgspec.structs.replace(fleet.ready()[0], rid="m-back", gen=fleet.now_ms)
    fleet.replicas["m"]["m-back"] = back
    run(fleet, 10)
    assert len(fleet.all_replicas()) == 2


def test_external_servers_get_one_replica_each() -> None:
    """Every URL has one replica whatever the count says; a URL that is removed loses its own."""
    urls = ("http://a:1", "http://b:1")
    fleet = Fleet([host("h0")], [declared(kind=EngineKind.EXTERNAL, urls=urls)])
    run(fleet)
    assert sorted(r.url for r in fleet.ready()) == list(urls)
    assert {o.url for o in fleet.orders["h0"].values()} == set(urls)
    fleet.declare(declared(kind=EngineKind.EXTERNAL, urls=urls[:1]))
    run(fleet)
    assert [r.url for r in fleet.all_replicas()] == list(urls[:1])


def test_external_replicas_move_away_from_a_dead_agent() -> None:
    """Another agent takes over a URL whose agent fell silent, without a gap in service."""
    urls = ("http://a:1", "http://b:1")
    fleet = Fleet([host("h0"), host("h1")], [declared(kind=EngineKind.EXTERNAL, urls=urls)])
    run(fleet)
    fleet.kill_agent("h0")
    for rid in [r.rid for r in fleet.ready()]:
        fleet.answers[rid] = True
    for _ in range(120):
        fleet.apply(plan(fleet.world()))
        assert {r.url for r in fleet.ready()} == set(urls)
        fleet.step()
    assert {r.host for r in fleet.living()} == {"h1"}


def test_what_is_not_declared_is_not_touched() -> None:
    """Records and orders of a model without a declaration are left alone: it may be lost data."""
    fleet = serving(replicas=1)
    del fleet.deployments["m"]
    assert plan(fleet.world()) == []


def test_members_long_silent_are_forgotten_but_not_a_host_in_use() -> None:
    """After an hour of silence processes are forgotten; a host only when nothing is on it."""
    fleet = serving(replicas=1, hosts=2)
    used = fleet.ready()[0].host
    unused = "h1" if used == "h0" else "h0"
    fleet.members = {"proxy:p": 3_600_001, f"agent:{used}": 3_600_001, f"agent:{unused}": 3_600_001}
    actions = plan(fleet.world())
    assert {a.field for a in actions if isinstance(a, ForgetMember)} == {
        "proxy:p",
        f"agent:{unused}",
    }
    assert [a.host for a in actions if isinstance(a, ForgetHost)] == [unused]


def test_a_hold_on_a_host_outlives_the_moment() -> None:
    """Holds on hosts stay until an operator lifts them."""
    fleet = serving(replicas=1)
    fleet.holds["host:elsewhere"] = Hold(subject="host:elsewhere", drain=False, since_ms=0)
    assert not only(plan(fleet.world()), DropHold)


@pytest.mark.parametrize("state", [ReplicaState.PENDING, ReplicaState.STARTING])
def test_a_surplus_replica_that_has_not_begun_is_left_to_begin(state: ReplicaState) -> None:
    """PENDING cannot drain and is not killed; STARTING is drained before anything READY is."""
    fleet = serving(replicas=2)
    new = msgspec.structs.replace(fleet.ready()[0], rid="m-new", state=state, gen=fleet.now_ms)
    fleet.replicas["m"]["m-new"] = new
    moves = [a.replica.rid for a in plan(fleet.world()) if isinstance(a, Move)]
    assert moves == ([] if state is ReplicaState.PENDING else ["m-new"])


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_interrupted_plans_converge_to_the_same_end(seed: int, data: st.DataObject) -> None:
    """However often plans are cut short and leaders change, the fleet ends as declared.

    On the way there are never two orders for a replica, never more than one living replica too
    many by our own doing, and never fewer READY than wanted because of a retirement.
    """
    rng = random.Random(seed)
    hosts = data.draw(st.integers(1, 4))
    first = data.draw(st.integers(0, 5))
    fleet = Fleet([host(f"h{i}") for i in range(hosts)], [declared(replicas=first)])
    wanted, dtype = first, "auto"
    for _ in range(data.draw(st.integers(1, 4))):
        for _ in range(rng.randrange(1, 15)):
            actions = plan(fleet.world())
            part = actions[: rng.randrange(len(actions) + 1)]
            ready, living = len(fleet.ready()), len(fleet.living())
            fleet.apply(part)
            assert len(fleet.ready()) >= min(ready, wanted)
            assert len(fleet.living()) <= max(living, wanted + 1)
            if rng.random() < 0.7:
                fleet.step(rng.choice([0.1, 1.0, 5.0]))
        disturb(fleet, rng)
        wanted, dtype = rng.randrange(6), rng.choice(["auto", "float32", "half"])
        fleet.declare(declared(replicas=wanted, dtype=dtype))
    run(fleet, 150)
    fleet.step(400)
    run(fleet, 3)
    end = fleet.all_replicas()
    assert [r.state for r in end] == [ReplicaState.READY] * wanted
    assert {r.revision for r in end} <= {declared(dtype=dtype).spec.revision()}
    assert sum(len(orders) for orders in fleet.orders.values()) == wanted
    assert plan(fleet.world()) == []


def disturb(fleet: Fleet, rng: random.Random) -> None:
    """Let something go wrong: a crash, a failing probe, a lost order, or a lost record."""
    replicas: list[Replica] = fleet.all_replicas()
    if not replicas:
        return
    victim = rng.choice(replicas)
    match rng.randrange(4):
        case 0 if victim.state is ReplicaState.READY:
            fleet.move(victim, ReplicaState.FAILED, "exit code -9")
        case 1 if victim.state is ReplicaState.READY:
            fleet.move(victim, ReplicaState.UNHEALTHY, "probe failed")
        case 2:
            fleet.orders.get(victim.host, {}).pop(victim.rid, None)
        case 3:
            del fleet.replicas[victim.model][victim.rid]
        case _:
            pass


def test_bounds_do_not_matter_to_the_plan() -> None:
    """The wanted number is the deployment's own; bounds are checked where it is changed."""
    spec = msgspec.structs.replace(declared().spec, replicas=ReplicaBounds(count=1, max=1))
    fleet = Fleet([host("h0")], [msgspec.structs.replace(declared(), spec=spec, replicas=2)])
    run(fleet)
    assert len(fleet.ready()) == 2
