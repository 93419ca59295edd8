import msgspec

from services.controller.notices import notice
from services.controller.world import World
from shared.models.replica import Replica, ReplicaState
from tests.unit.controller.fleet import Fleet, declared, host


def kinds(before: World | None, now: World) -> list[str]:
    """Name what is told."""
    return [event.kind for event in notice(before, now)]


def replica(revision: str) -> Replica:
    """Make a READY replica of a revision."""
    return Replica(
        rid="m-1", model="m", gen=1, state=ReplicaState.READY, host="h0", revision=revision
    )


def with_replicas(world: World, *replicas: Replica) -> World:
    """Give the world in which the model has these replicas."""
    records = {record.rid: record for record in replicas}
    view = msgspec.structs.replace(world.models["m"], replicas=records)
    return msgspec.structs.replace(world, models={"m": view})


def test_the_first_reading_tells_nothing() -> None:
    """A new leader does not announce as news what it merely finds."""
    assert notice(None, Fleet([host("h0")], [declared()]).world()) == []


def test_hosts_come_fall_silent_and_come_back() -> None:
    """Each change of a host is told once, when it happens."""
    fleet = Fleet([], [])
    empty = fleet.world()
    fleet.hosts["h0"] = host("h0")
    joined = fleet.world()
    fleet.kill_agent("h0")
    fleet.step(11)
    silent = fleet.world()
    fleet.dead.clear()
    back = fleet.world()
    assert kinds(empty, joined) == ["HostJoined"]
    assert kinds(joined, silent) == ["HostSilent"]
    assert kinds(silent, silent) == []
    assert kinds(silent, back) == ["HostBack"]


def test_a_rollout_is_told_when_it_is_complete() -> None:
    """When the last replica of an older revision is gone and all are READY, the rollout is done."""
    world = Fleet([host("h0")], [declared()]).world()
    view = world.models["m"]
    revision = view.deployment.spec.revision()
    new = replica(revision)
    old = msgspec.structs.replace(new, rid="m-old", revision="older")
    mixed = with_replicas(world, new, old)
    done = with_replicas(world, new)
    assert kinds(mixed, done) == ["RolledOut"]
    assert kinds(done, done) == []
    starting = msgspec.structs.replace(new, state=ReplicaState.STARTING)
    assert kinds(mixed, with_replicas(world, starting)) == []


def test_foreign_content_is_told_once() -> None:
    """What does not parse is an error event when it first appears."""
    world = Fleet([], []).world()
    corrupt = msgspec.structs.replace(world, corrupt=("replica/m-x",))
    assert kinds(world, corrupt) == ["CorruptRecord"]
    assert kinds(corrupt, corrupt) == []
