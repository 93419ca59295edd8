"""A plan under a clock that goes back: what was written before must not hold anything up."""

from typing import Final

import pytest

from shared.models.replica import ReplicaState
from tests.unit.controller.fleet import Fleet, declared
from tests.unit.controller.test_plan import run, serving

HOUR_MS: Final = 3_600_000


def back(fleet: Fleet, by_ms: int = HOUR_MS) -> None:
    """Let Redis' clock go back."""
    fleet.now_ms -= by_ms


@pytest.mark.parametrize("by_ms", [9000, HOUR_MS])
def test_replicas_are_added_after_the_clock_went_back(by_ms: int) -> None:
    """A model that exists for longer than the clock says is scaled all the same."""
    fleet = serving(replicas=2)
    back(fleet, by_ms)
    fleet.declare(declared(replicas=4))
    run(fleet, 30)
    assert len(fleet.ready()) == 4


def test_a_dead_replica_is_replaced_after_the_clock_went_back() -> None:
    """A failure from before is no reason to wait for an hour, and its record goes in time."""
    fleet = serving(replicas=2)
    victim = fleet.ready()[0]
    fleet.move(victim, ReplicaState.FAILED, "killed by SIGKILL")
    back(fleet)
    run(fleet, 30)
    assert len(fleet.ready()) == 2
    assert victim.rid not in fleet.replicas["m"]


def test_a_crash_loop_slows_down_after_the_clock_went_back() -> None:
    """Failures from before are forgotten, and those that follow count as ever."""
    fleet = serving(replicas=1)
    fleet.broken.add(declared().spec.revision())
    fleet.move(fleet.ready()[0], ReplicaState.FAILED, "exit code 1")
    run(fleet, 30)
    back(fleet)
    before = {replica.rid for replica in fleet.all_replicas()}
    made: set[str] = set()
    for _ in range(60):
        run(fleet, 1)
        made |= {replica.rid for replica in fleet.all_replicas()} - before
    assert 2 <= len(made) <= 8
