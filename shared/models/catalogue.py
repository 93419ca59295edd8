"""What is declared, as somebody remembers it, and what data that were lost must get back. Pure.

Redis may lose everything, or the last seconds before a failover. Whoever has read the declarations
remembers them, and compares: of two versions of one deployment the later holds, by the time of its
declaration and then by its generation, whoever has it. A deletion is a version too, so a process
that was away while a model was deleted cannot bring it back where the deletion is known.
"""

from collections.abc import Collection

import msgspec

from shared.models.deployment import Deployment

FORGOTTEN_KEPT = 1000
"""Deletions that are remembered: the latest ones."""


class Catalogue(msgspec.Struct, frozen=True, kw_only=True):
    """Every deployment by model, and the deletions that were carried out."""

    deployments: dict[str, Deployment] = msgspec.field(default_factory=dict[str, Deployment])
    forgotten: dict[str, Deployment] = msgspec.field(default_factory=dict[str, Deployment])
    """Model → the deployment as it was when nothing was left of it and it was forgotten."""


class Redeclare(msgspec.Struct, frozen=True, kw_only=True):
    """Store this deployment, if the generation stored is still `expected` (0: none)."""

    deployment: Deployment
    expected: int


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be written so that nothing later than it is missing."""

    redeclare: tuple[Redeclare, ...] = ()
    bury: tuple[Deployment, ...] = ()
    """Deletions to note again."""
    excess: tuple[str, ...] = ()
    """The oldest deletions, beyond the number that is kept."""


def age(deployment: Deployment) -> tuple[int, int]:
    """Order the versions of one deployment: a greater one is later."""
    return deployment.updated_ms, deployment.generation


def merged(stored: Catalogue, remembered: Catalogue) -> Catalogue:
    """Give what is worth remembering of both: the latest of each, and nothing that is deleted."""
    forgotten = _latest(stored.forgotten, remembered.forgotten)
    kept = sorted(forgotten, key=lambda model: age(forgotten[model]))[-FORGOTTEN_KEPT:]
    deployments = _latest(stored.deployments, remembered.deployments)
    return Catalogue(
        deployments={
            model: deployment
            for model, deployment in deployments.items()
            if model not in forgotten or age(forgotten[model]) < age(deployment)
        },
        forgotten={model: forgotten[model] for model in kept},
    )


def lost(stored: Catalogue, remembered: Catalogue, unreadable: Collection[str]) -> Loss:
    """Compare what is stored with what is remembered; `unreadable` models are not ours to mend."""
    forgotten = _latest(stored.forgotten, remembered.forgotten)
    redeclare: list[Redeclare] = []
    bury: list[Deployment] = []
    for model in sorted(remembered.deployments.keys() | remembered.forgotten.keys()):
        if model in unreadable:
            continue
        here, mine = stored.deployments.get(model), remembered.deployments.get(model)
        end = forgotten.get(model)
        if end is not None and end is not stored.forgotten.get(model):
            bury.append(end)
        if end is not None and (mine is None or age(end) >= age(mine)):
            risen = here is not None and not here.deleted and age(here) <= age(end)
            mine = end if risen else None
        wanted = _wanted(here, mine)
        if wanted is not None and wanted != here:
            redeclare.append(Redeclare(deployment=wanted, expected=here.generation if here else 0))
    by_age = sorted(stored.forgotten, key=lambda model: age(stored.forgotten[model]))
    return Loss(
        redeclare=tuple(redeclare),
        bury=tuple(bury),
        excess=tuple(by_age[: max(0, len(by_age) - FORGOTTEN_KEPT)]),
    )


def _wanted(here: Deployment | None, mine: Deployment | None) -> Deployment | None:
    """Choose the later one, under a generation that neither has exceeded."""
    if mine is None or here is None:
        return mine
    later, earlier = (here, mine) if age(here) >= age(mine) else (mine, here)
    if later.generation > earlier.generation or age(later) == age(earlier):
        return later
    return msgspec.structs.replace(later, generation=earlier.generation + 1)


def _latest(first: dict[str, Deployment], second: dict[str, Deployment]) -> dict[str, Deployment]:
    latest = dict(first)
    for model, deployment in second.items():
        if model not in latest or age(latest[model]) < age(deployment):
            latest[model] = deployment
    return latest
