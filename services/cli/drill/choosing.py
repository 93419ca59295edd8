"""Which injector does a drill here: the nearest one that can, or the one that was named."""

from enum import StrEnum

import msgspec

from services.cli.drill import ecs, linked, local, remote
from services.cli.drill.catalogue import Drill, Fault
from services.cli.drill.injection import Injection, cannot
from services.cli.drill.scene import Scene
from shared.registry import Registry


class Via(StrEnum):
    """How a fault gets to where it strikes."""

    AUTO = "auto"
    SIGNAL = "signal"
    """Signals to processes that `redmesh up` runs on this machine."""
    LINK = "link"
    """The links of a mesh that was started with `redmesh up --links`."""
    AGENT = "agent"
    """The agent of the host that runs the engine."""
    REDIS = "redis"
    """Commands of Redis itself."""
    DECLARE = "declare"
    """What an operator declares."""
    ECS = "ecs"
    """Tasks that Amazon ECS stops."""


class Means(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line gives an injector to work with."""

    via: Via
    hold_s: float
    ecs_cluster: str = ""


_TASKS = (
    "its processes do not run on this machine; a task of ECS can be stopped by --ecs-cluster NAME"
)
_HERE = (
    "its processes do not run on this machine: run it where `redmesh up` runs, with the "
    "--state-dir of that mesh"
)
_MISSING = {
    **dict.fromkeys(Fault, _HERE),
    **dict.fromkeys(ecs.FAULTS, _TASKS),
    Fault.REDIS_RESTART: "its Redis was not started here; restart it by the means of whoever "
    "runs it, or rehearse redis-disconnect and redis-away",
    Fault.REDIS_EMPTY: "only the Redis of a mesh that `redmesh up` started here is emptied",
}
"""What is missing for a fault that nothing here can bring about."""


async def choose(drill: Drill, scene: Scene, registry: Registry, means: Means) -> Injection:
    """Make the fault ready by the injector that fits; raise `InvalidInputError` if none does."""
    via = _fitting(drill, scene, means) if means.via is Via.AUTO else means.via
    match via:
        case Via.SIGNAL if drill.fault in local.FAULTS:
            return local.prepare(drill, scene)
        case Via.LINK if drill.fault in linked.FAULTS:
            return await linked.prepare(drill, scene, means.hold_s)
        case Via.AGENT if drill.fault in remote.AGENT_FAULTS:
            return remote.by_agent(drill, scene, registry, means.hold_s)
        case Via.REDIS if drill.fault in remote.REDIS_FAULTS:
            return await remote.by_redis(drill, registry, means.hold_s)
        case Via.ECS if drill.fault in ecs.FAULTS:
            return await ecs.prepare(drill, scene, means.ecs_cluster)
        case Via.DECLARE if drill.fault is Fault.ROLL:
            return remote.by_declaring(scene, registry)
        case _:
            raise cannot(drill, f"--via {via} has no way to bring this fault about")


def _fitting(drill: Drill, scene: Scene, means: Means) -> Via:
    if drill.fault is Fault.ROLL:
        return Via.DECLARE
    if scene.mesh is not None and drill.fault in local.FAULTS:
        return Via.SIGNAL
    if drill.fault in linked.FAULTS and (
        linked.has_links(scene) or drill.fault is not Fault.REDIS_FAILOVER
    ):
        return Via.LINK
    if drill.fault in remote.AGENT_FAULTS:
        return Via.AGENT
    if drill.fault in remote.REDIS_FAULTS:
        return Via.REDIS
    if means.ecs_cluster and drill.fault in ecs.FAULTS:
        return Via.ECS
    raise cannot(drill, _MISSING[drill.fault])
