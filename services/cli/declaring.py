"""Writes deployments: declare, change and delete, each against the generation that was read.

Two operators who change one deployment at once do not overwrite each other: the write names the
generation it saw, and a lost race is read and decided again.
"""

import getpass
import os
import shlex
import socket
from collections.abc import Callable
from enum import StrEnum

import msgspec

from shared.errors import InvalidInputError, NotFoundError, RedmeshError
from shared.models.deployment import Deployment, DeploymentSpec
from shared.models.event import Event
from shared.registry import Registry

_TRIES = 5


class Change(StrEnum):
    """What applying a spec does to its deployment."""

    CREATED = "created"
    UPDATED = "updated"
    UNCHANGED = "unchanged"


def author() -> str:
    """Name who changes something, for the record."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def later(current: Deployment, at_ms: int) -> int:
    """Give the time of a new version: after the current one, even if Redis' clock was set back.

    After a loss of data the later version holds.
    """
    return max(at_ms, current.updated_ms + 1)


def changed(
    current: Deployment | None, spec: DeploymentSpec, *, at_ms: int, by: str
) -> tuple[Change, Deployment]:
    """Decide what `spec` makes of the deployment as it is.

    A number of replicas set by `redmesh scale` stays, within the bounds, unless the file's own
    number has changed.
    """
    if current is None or current.deleted:
        generation = 1 if current is None else current.generation + 1
        return Change.CREATED, Deployment(
            spec=spec,
            generation=generation,
            replicas=spec.replicas.count,
            updated_ms=at_ms if current is None else later(current, at_ms),
            updated_by=by,
        )
    if current.spec == spec:
        return Change.UNCHANGED, current
    replicas = current.replicas
    if current.spec.replicas.count != spec.replicas.count:
        replicas = spec.replicas.count
    return Change.UPDATED, msgspec.structs.replace(
        current,
        spec=spec,
        generation=current.generation + 1,
        replicas=min(max(replicas, spec.replicas.min), spec.replicas.max),
        updated_ms=later(current, at_ms),
        updated_by=by,
    )


def scaled(current: Deployment, count: int, *, at_ms: int, by: str) -> Deployment:
    """Set the number of replicas; raise `InvalidInputError` outside the declared bounds."""
    bounds = current.spec.replicas
    if not bounds.min <= count <= bounds.max:
        raise InvalidInputError(
            f"{current.spec.name} may have {bounds.min} to {bounds.max} replicas, not {count}: "
            "change replicas.min or replicas.max in its models file and apply it",
            field="N",
        )
    return msgspec.structs.replace(
        current,
        replicas=count,
        generation=current.generation + 1,
        updated_ms=later(current, at_ms),
        updated_by=by,
    )


async def check_names(registry: Registry, specs: list[DeploymentSpec]) -> None:
    """Raise `InvalidInputError` when a name or alias belongs to another deployment already."""
    owners: dict[str, str] = {}
    applied = {spec.name for spec in specs}
    for model, deployment in (await registry.fleet.deployments()).items():
        if model not in applied and not deployment.deleted:
            owners.update(dict.fromkeys((model, *deployment.spec.aliases), model))
    problems = [
        f"{spec.name}: the name {name!r} already belongs to the deployment {owners[name]!r}"
        for spec in specs
        for name in (spec.name, *spec.aliases)
        if name in owners
    ]
    if problems:
        raise InvalidInputError("nothing was applied:\n" + "\n".join(problems))


async def declare(registry: Registry, spec: DeploymentSpec) -> Change:
    """Declare one deployment."""
    for _ in range(_TRIES):
        deployments = await registry.fleet.deployments()
        current = deployments.get(spec.name)
        now_ms = await registry.replicas.server_time_ms()
        change, wanted = changed(current, spec, at_ms=now_ms, by=author())
        if change is Change.UNCHANGED:
            return change
        seen = current.generation if current else 0
        if await registry.fleet.declare(spec.name, wanted, seen):
            await _tell(registry, spec.name, f"Deployment{change.capitalize()}", f"{change}")
            return change
        if spec.name in deployments.corrupt:
            raise _unreadable(registry, spec.name)
    raise RedmeshError(f"{spec.name} is being changed by somebody else: try again")


async def change(
    registry: Registry, model: str, decide: Callable[[Deployment, int], Deployment], what: str
) -> Deployment:
    """Change an existing deployment by `decide(deployment, now_ms)`; say `what` in an event."""
    for _ in range(_TRIES):
        current = await find(registry, model)
        wanted = decide(current, await registry.replicas.server_time_ms())
        name = current.spec.name
        if await registry.fleet.declare(name, wanted, current.generation):
            await _tell(registry, name, "DeploymentUpdated", what)
            return wanted
    raise RedmeshError(f"{model} is being changed by somebody else: try again")


async def find(registry: Registry, model: str) -> Deployment:
    """Find a deployment by name or alias; raise `NotFoundError` that lists those there are."""
    deployments = await registry.fleet.deployments()
    for name, deployment in deployments.items():
        if not deployment.deleted and model in (name, *deployment.spec.aliases):
            return deployment
    if model in deployments.corrupt:
        raise _unreadable(registry, model)
    known = ", ".join(sorted(deployments)) or "none"
    raise NotFoundError(f"there is no deployment {model!r}; declared are: {known}")


def _unreadable(registry: Registry, model: str) -> RedmeshError:
    remove = shlex.join(("redmesh", "redis", "--", "HDEL", registry.keys.fleet.deployments, model))
    return RedmeshError(
        f"what is stored of {model} does not parse: a newer release or something else wrote it. "
        f"Use that release, or remove it with `{remove}` and apply again"
    )


async def _tell(registry: Registry, model: str, kind: str, what: str) -> None:
    await registry.fleet.emit(
        Event(
            kind=kind,
            subject=f"deployment/{model}",
            message=f"{what} by {author()}",
            source="cli",
        )
    )
