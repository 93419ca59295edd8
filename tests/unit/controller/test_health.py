import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.controller.health import budget
from services.controller.plan import plan
from shared.models.replica import Replica, ReplicaState
from tests.unit.controller.fleet import Fleet, declared, host


def at_rest(replicas: int = 4, hosts: int = 1) -> Fleet:
    """Make a fleet of READY replicas that rests."""
    fleet = Fleet([host(f"h{i}") for i in range(hosts)], [declared(replicas=replicas)])
    for _ in range(10):
        fleet.apply(plan(fleet.world()))
        fleet.step()
    assert len(fleet.ready()) == replicas
    return fleet


def silence(fleet: Fleet, seconds: float, *, answers: bool) -> None:
    """Let every agent fall silent, and the engines answer the leader or not."""
    for name in fleet.hosts:
        fleet.kill_agent(name)
    fleet.now_ms += round(seconds * 1000)
    fleet.answers = {r.rid: answers for r in fleet.all_replicas()}


def unhealthy(fleet: Fleet) -> list[Replica]:
    """Give the replicas that are in doubt."""
    return [r for r in fleet.living() if r.state is ReplicaState.UNHEALTHY]


def test_engines_that_answer_outlive_their_agent() -> None:
    """A silent agent alone costs no replica its place, however long it is silent."""
    fleet = at_rest()
    silence(fleet, 3000, answers=True)
    fleet.apply(plan(fleet.world()))
    assert len(fleet.ready()) == 4


def test_silent_engines_that_do_not_answer_are_doubted_then_given_up() -> None:
    """After 10 s of silence without an answer one in four is UNHEALTHY; after 60 s it is FAILED."""
    fleet = at_rest()
    silence(fleet, 9, answers=False)
    assert plan(fleet.world()) == []
    fleet.now_ms += 2_000
    fleet.apply(plan(fleet.world()))
    assert len(unhealthy(fleet)) == 1
    fleet.now_ms += 40_000
    fleet.apply(plan(fleet.world()))
    assert len(unhealthy(fleet)) == 1
    fleet.now_ms += 20_000
    fleet.apply(plan(fleet.world()))
    assert [r.state for r in fleet.all_replicas()].count(ReplicaState.FAILED) == 1


def test_a_doubt_of_the_leader_is_lifted_by_an_answer() -> None:
    """What the leader marked UNHEALTHY for silence is READY again as soon as it answers."""
    fleet = at_rest(replicas=1)
    silence(fleet, 12, answers=False)
    fleet.apply(plan(fleet.world()))
    assert not fleet.ready()
    fleet.answers = dict.fromkeys(fleet.answers, True)
    fleet.apply(plan(fleet.world()))
    assert len(fleet.ready()) == 1


def test_a_doubt_of_an_agent_is_not_lifted_by_an_answer_to_the_leader() -> None:
    """The agent's probe generates a token; that the port answers proves less."""
    fleet = at_rest(replicas=1)
    fleet.move(fleet.ready()[0], ReplicaState.UNHEALTHY, "3 probes failed")
    silence(fleet, 12, answers=True)
    fleet.apply(plan(fleet.world()))
    assert not fleet.ready()


def test_nothing_is_doubted_before_things_settled() -> None:
    """Right after Redis' or leadership's return old heartbeats prove nothing."""
    fleet = at_rest()
    silence(fleet, 300, answers=False)
    fleet.settled = False
    assert plan(fleet.world()) == []


def test_a_lost_host_is_replaced_elsewhere() -> None:
    """Replicas of a host that died come back on another one within a few minutes."""
    fleet = at_rest(replicas=4, hosts=2)
    lost = fleet.ready()[0].host
    fleet.kill_agent(lost)
    fleet.answers = {r.rid: r.host != lost for r in fleet.all_replicas()}
    for _ in range(150):
        fleet.apply(plan(fleet.world()))
        fleet.step()
    assert len(fleet.ready()) == 4
    assert {r.host for r in fleet.ready()} == set(fleet.hosts) - {lost}


def test_a_replica_that_stays_unhealthy_is_replaced() -> None:
    """UNHEALTHY for more than a minute under a living agent is drained and replaced."""
    fleet = at_rest(replicas=2)
    sick = fleet.ready()[0]
    fleet.move(sick, ReplicaState.UNHEALTHY, "3 probes failed")
    for _ in range(59):
        fleet.apply(plan(fleet.world()))
        fleet.step()
    assert len(unhealthy(fleet)) == 1
    for _ in range(10):
        fleet.apply(plan(fleet.world()))
        fleet.step()
    assert len(fleet.ready()) == 2
    assert sick.rid not in {r.rid for r in fleet.all_replicas()}


@pytest.mark.parametrize(
    ("state", "seconds", "agent_dies", "why"),
    [
        (ReplicaState.PENDING, 11, True, "went silent before it began"),
        (ReplicaState.PENDING, 61, False, "did not begin within 60 s"),
        (ReplicaState.STARTING, 61, True, "went silent while it started"),
        (ReplicaState.STARTING, 961, False, "not READY within 900 s"),
        (ReplicaState.DRAINING, 61, True, "went silent while it drained"),
        (ReplicaState.DRAINING, 271, False, "did not stop in time"),
    ],
)
def test_what_does_not_get_on_is_given_up(
    state: ReplicaState, seconds: int, *, agent_dies: bool, why: str
) -> None:
    """A replica stuck on its way fails, with a reason that tells at what."""
    fleet = at_rest(replicas=1)
    stuck = msgspec.structs.replace(fleet.ready()[0], state=state, since_ms=fleet.now_ms)
    fleet.replicas["m"] = {stuck.rid: stuck}
    if agent_dies:
        fleet.kill_agent("h0")
    fleet.now_ms += (seconds - 2) * 1000
    fleet.apply(plan(fleet.world()))
    assert fleet.replicas["m"][stuck.rid].state is state
    fleet.now_ms += 3_000
    fleet.apply(plan(fleet.world()))
    assert fleet.replicas["m"][stuck.rid].state is ReplicaState.FAILED
    assert why in fleet.replicas["m"][stuck.rid].reason


@settings(max_examples=60, deadline=None)
@given(
    replicas=st.integers(1, 12),
    hosts=st.integers(1, 3),
    answers=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_never_more_than_thirty_percent_at_once(
    replicas: int, hosts: int, answers: list[bool]
) -> None:
    """Whatever falls silent, in no ten seconds are more than 30 % of the READY taken away."""
    fleet = at_rest(replicas=replicas, hosts=hosts)
    silence(fleet, 11, answers=True)
    rids = sorted(r.rid for r in fleet.all_replicas())
    for _ in range(12):
        fleet.answers = dict(zip(rids, answers, strict=False))
        living, ready = len(fleet.living()), len(fleet.ready())
        for _ in range(10):
            fleet.apply(plan(fleet.world()))
            assert ready - len(fleet.ready()) <= budget(living)
            fleet.step()
