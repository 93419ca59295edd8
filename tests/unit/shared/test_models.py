import msgspec

from shared.clock import ManualClock, SystemClock
from shared.models.deployment import DeploymentSpec, EngineSpec, ReplicaBounds
from shared.models.replica import ENDED, TRANSITIONS, ReplicaState


def test_scaling_does_not_change_the_revision() -> None:
    """Replica counts are not part of a revision; the engine's arguments are."""
    spec = DeploymentSpec(name="m", engine=EngineSpec(model="w"))
    scaled = msgspec.structs.replace(spec, replicas=ReplicaBounds(count=3))
    changed = msgspec.structs.replace(spec, engine=EngineSpec(model="w", dtype="float32"))
    assert spec.revision() == scaled.revision()
    assert spec.revision() != changed.revision()


def test_a_spec_survives_storage() -> None:
    """What is written as JSON reads back as the same spec, with the same revision."""
    spec = DeploymentSpec(name="m", aliases=("o/m",), engine=EngineSpec(model="w", env={"A": "b"}))
    again = msgspec.json.decode(msgspec.json.encode(spec), type=DeploymentSpec)
    assert again == spec
    assert again.revision() == spec.revision()


def test_every_state_has_its_row_and_only_ended_ones_have_no_future() -> None:
    """The transition table names every state; those without successors are the ended ones."""
    assert set(TRANSITIONS) == set(ReplicaState)
    assert {state for state, following in TRANSITIONS.items() if not following} == ENDED


def test_every_living_state_may_fail() -> None:
    """From any state that has a future a replica may become FAILED."""
    living = set(ReplicaState) - ENDED
    assert all(ReplicaState.FAILED in TRANSITIONS[state] for state in living)


def test_clocks() -> None:
    """The manual clock moves only by hand; the system clock's milliseconds are of this age."""
    clock = ManualClock(now_ms=1000)
    clock.advance(1.5)
    assert (clock.now_ms(), clock.monotonic_s()) == (2500, 1.5)
    system = SystemClock()
    assert system.now_ms() > 1_700_000_000_000
    assert system.monotonic_s() <= system.monotonic_s()
