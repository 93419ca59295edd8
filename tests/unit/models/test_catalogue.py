"""Who wins when memories of what is declared differ: the later version, and never a dead one."""

import itertools
import random

import msgspec
import pytest

from shared.models import catalogue
from shared.models.catalogue import Catalogue, Loss, Redeclare, age, lost, merged
from shared.models.deployment import Deployment, DeploymentSpec


def version(generation: int, at_ms: int, *, deleted: bool = False, name: str = "m") -> Deployment:
    """Make a version of a deployment."""
    return Deployment(
        spec=DeploymentSpec(name=name),
        generation=generation,
        replicas=0 if deleted else generation,
        deleted=deleted,
        updated_ms=at_ms,
    )


def knowing(alive: Deployment | None = None, dead: Deployment | None = None) -> Catalogue:
    """Make what somebody knows of one model."""
    return Catalogue(
        deployments={alive.spec.name: alive} if alive else {},
        forgotten={dead.spec.name: dead} if dead else {},
    )


V1, V2, END = version(1, 100), version(2, 200), version(3, 300, deleted=True)


@pytest.mark.parametrize(
    ("stored", "remembered", "wanted"),
    [
        (knowing(), knowing(V2), Loss(redeclare=(Redeclare(deployment=V2, expected=0),))),
        (knowing(V1), knowing(V2), Loss(redeclare=(Redeclare(deployment=V2, expected=1),))),
        (knowing(V2), knowing(V1), Loss()),
        (knowing(V2), knowing(V2), Loss()),
        (knowing(V2), knowing(), Loss()),
        (knowing(dead=END), knowing(V2), Loss()),
        (knowing(END), knowing(V2), Loss()),
        (knowing(), knowing(dead=END), Loss(bury=(END,))),
        (
            knowing(V2),
            knowing(dead=END),
            Loss(redeclare=(Redeclare(deployment=END, expected=2),), bury=(END,)),
        ),
        (knowing(version(1, 400)), knowing(dead=END), Loss(bury=(END,))),
        (knowing(version(1, 400), END), knowing(V2, None), Loss()),
    ],
    ids=[
        "lost",
        "the latest change was lost",
        "a memory of before a change",
        "nothing happened",
        "something new",
        "a memory of before the deletion",
        "being deleted",
        "the note of a deletion was lost",
        "a failover brought a deleted model back",
        "declared again after its deletion",
        "declared again, and a memory of before",
    ],
)
def test_what_is_mended(stored: Catalogue, remembered: Catalogue, wanted: Loss) -> None:
    """Only what is later than what is stored is written, over exactly what was read."""
    assert lost(stored, remembered, ()) == wanted


def test_a_generation_is_never_lowered() -> None:
    """What an operator applied by hand to the empty Redis holds, under a generation above all."""
    by_hand = version(1, 500)
    loss = lost(knowing(by_hand), knowing(version(7, 200)), ())
    (wish,) = loss.redeclare
    assert wish.expected == 1
    assert wish.deployment == msgspec.structs.replace(by_hand, generation=8)


def test_what_does_not_parse_is_left_alone() -> None:
    """A newer release may have written it: a memory is no reason to overwrite it."""
    assert lost(knowing(), knowing(V1), {"m"}) == Loss()


def test_only_the_latest_deletions_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The notes of deletions are bounded, in memory and in Redis; the oldest go."""
    monkeypatch.setattr(catalogue, "FORGOTTEN_KEPT", 2)
    notes = {f"m{n}": version(1, n, deleted=True, name=f"m{n}") for n in range(4)}
    stored = Catalogue(forgotten=notes)
    assert lost(stored, Catalogue(), ()).excess == ("m0", "m1")
    assert set(merged(stored, Catalogue()).forgotten) == {"m2", "m3"}


def _apply(stored: Catalogue, loss: Loss) -> Catalogue:
    deployments, forgotten = dict(stored.deployments), dict(stored.forgotten)
    for wish in loss.redeclare:
        here = deployments.get(wish.deployment.spec.name)
        assert wish.expected == (here.generation if here else 0)
        assert wish.deployment.generation >= wish.expected
        deployments[wish.deployment.spec.name] = wish.deployment
    for note in loss.bury:
        forgotten[note.spec.name] = note
    return Catalogue(deployments=deployments, forgotten=forgotten)


@pytest.mark.parametrize("seed", range(300))
def test_any_memories_in_any_order_end_with_the_latest_version(seed: int) -> None:
    """Redis forgot some of the history; each remembers some of it: all come to the same end."""
    source = random.Random(seed)
    history: list[Catalogue] = [Catalogue()]
    generation, at_ms = 0, 0
    for _ in range(source.randrange(1, 6)):
        at_ms += source.randrange(1, 50)
        deleted = generation > 0 and source.random() < 0.4
        generation = generation + 1 if generation else 1
        last = version(generation, at_ms, deleted=deleted)
        history.append(Catalogue(deployments={"m": last}, forgotten=history[-1].forgotten))
        if deleted:
            history.append(knowing(dead=last))
            generation = 0
    stored = source.choice(history)
    memories = [history[-1], *(source.choice(history) for _ in range(3))]
    source.shuffle(memories)
    for memory in itertools.chain(memories, memories):
        stored = _apply(stored, lost(stored, memory, ()))
    truth = history[-1]
    if "m" in truth.deployments:
        assert age(stored.deployments["m"]) >= age(truth.deployments["m"])
        assert stored.deployments["m"].updated_ms == truth.deployments["m"].updated_ms
    else:
        here = stored.deployments.get("m")
        assert here is None or here.deleted
    assert all(lost(stored, memory, ()) == Loss() for memory in memories)
