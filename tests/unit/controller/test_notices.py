from collections.abc import Iterable

import msgspec

from services.controller.notices import ForeignContent, notice
from services.controller.world import World
from shared.models.event import EventLevel
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


KEY = "redmesh:{m}:replicas"


class Telling:
    """A leader that reads the same world with other foreign content each time."""

    def __init__(self) -> None:
        self._fleet = Fleet([], [])
        self._foreign = ForeignContent()
        assert self.after(0) == []

    def after(self, passed_s: int, **corrupt: Iterable[str]) -> list[tuple[str, str]]:
        """Give subject and message of what is told of this content."""
        self._fleet.step(passed_s)
        names = {f"redmesh:{{m}}:{suffix}": frozenset(each) for suffix, each in corrupt.items()}
        world = msgspec.structs.replace(self._fleet.world(), corrupt=names)
        events = self._foreign.notice(world)
        assert {event.kind for event in events} <= {"CorruptRecord"}
        assert {event.level for event in events} <= {EventLevel.ERROR}
        return [(event.subject, event.message) for event in events]


def test_foreign_content_is_told_once() -> None:
    """What does not parse is an error event when it first appears, and again after it was gone."""
    told = Telling()
    ((subject, message),) = told.after(1, replicas=["m-x"])
    assert subject == f"key/{KEY}"
    assert "'m-x'" in message
    assert told.after(1, replicas=["m-x"]) == []
    assert told.after(600, replicas=["m-x"]) == []
    assert told.after(1) == []
    assert len(told.after(1, replicas=["m-x"])) == 1


def test_a_new_leader_does_not_tell_of_foreign_content_that_it_finds() -> None:
    """It was told by the one before; what comes later is news."""
    fleet, foreign = Fleet([], []), ForeignContent()
    world = msgspec.structs.replace(fleet.world(), corrupt={KEY: frozenset({"a"})})
    assert foreign.notice(world) == []
    fleet.step(61)
    more = msgspec.structs.replace(fleet.world(), corrupt={KEY: frozenset({"a", "b"})})
    assert len(foreign.notice(more)) == 1


def test_a_million_foreign_fields_are_one_event() -> None:
    """A key is told of once, with a few names and a number, however many fields it has."""
    told = Telling()
    names = [f"x{number:06}" for number in range(1_000_000)]
    ((_, message),) = told.after(1, replicas=[*names, "\n" * 10_000_000])
    assert "'x000000', 'x000001'" in message
    assert "999996 more" in message
    assert len(message) < 500
    assert told.after(1, replicas=names) == []


def test_foreign_fields_that_come_one_by_one_are_told_once_a_minute() -> None:
    """Whoever goes on writing does not push everything else out of the list of events."""
    told = Telling()
    many = [
        told.after(1, replicas=map(str, range(number)), deployments=[str(number)])
        for number in range(1, 601)
    ]
    assert sum(map(len, many)) == 2 * 10
    assert max(map(len, many)) == 2


def test_foreign_content_is_told_after_a_clock_that_went_back() -> None:
    """What was told in a future that was none keeps nothing quiet."""
    told = Telling()
    assert told.after(3600, replicas=["a"])
    assert told.after(-3600, replicas=["a", "b"])
