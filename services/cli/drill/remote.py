"""Injects faults where no process of the mesh is within reach: by agents, by Redis, by declaring.

Through an agent an engine is killed or frozen on its own host, if that host's agent permits drills.
Through Redis every connection is cut, Redis is made to answer nobody for a while, or a replica of
it is made primary. A rolling upgrade is no more than a new revision, declared.
"""

import asyncio
import contextlib
import secrets
import time
from typing import Final

import msgspec

from services.cli.declaring import author, change
from services.cli.drill.catalogue import Drill, Fault
from services.cli.drill.injection import Injection, cannot
from services.cli.drill.records import Struck
from services.cli.drill.scene import Scene
from services.cli.observing import info_of
from shared.errors import InvalidInputError, RegistryError
from shared.models.deployment import Deployment, DeploymentSpec
from shared.models.drill import DrillAct, DrillWish
from shared.registry import Registry
from shared.registry.drills import WISH_TTL_MS

AGENT_FAULTS: Final = frozenset({Fault.REPLICA_KILL, Fault.REPLICA_FREEZE})
REDIS_FAULTS: Final = frozenset({Fault.REDIS_DISCONNECT, Fault.REDIS_AWAY, Fault.REDIS_FAILOVER})
_POLL_S: Final = 0.1


def by_agent(drill: Drill, scene: Scene, registry: Registry, hold_s: float) -> Injection:
    """Kill or freeze an engine through the agent of its host."""
    victim = scene.victim_replica()
    host = scene.hosts.get(victim.host)
    if host is None or not host.drills_allowed:
        raise cannot(
            drill,
            f"the agent of {victim.host} does not permit drills: set REDMESH_DRILLS_ALLOWED=true "
            "there and start it again, or name another --target",
        )
    name = secrets.token_hex(4)

    async def wish(act: DrillAct) -> None:
        made = DrillWish(
            id=name, rid=victim.rid, gen=victim.gen, act=act, hold_s=hold_s, by=author()
        )
        await _wished(registry, victim.host, made)

    async def strike() -> None:
        freeze = drill.fault is Fault.REPLICA_FREEZE
        await wish(DrillAct.FREEZE if freeze else DrillAct.KILL)

    async def thaw() -> None:
        with contextlib.suppress(RegistryError):  # its agent thaws it when its time is over
            await wish(DrillAct.THAW)

    told = f"the agent of {victim.host} shall {drill.name.partition('-')[2]} the engine of "
    return Injection(
        told + victim.rid,
        Struck(replicas=frozenset({victim.rid})),
        strike,
        heal=thaw if drill.fault is Fault.REPLICA_FREEZE else None,
    )


async def _wished(registry: Registry, host: str, wish: DrillWish) -> None:
    """Put a wish and wait until the agent has answered it."""
    newest = await registry.fleet.events(1)
    since_id = newest[-1].id if newest else "0"
    if not await registry.drills.wish(host, wish):
        raise InvalidInputError(f"another drill is waiting for the agent of {host}: try again")
    until_s = time.monotonic() + WISH_TTL_MS / 1000 + 1.0
    while time.monotonic() < until_s:
        for event in await registry.fleet.events(200, since_id):
            if event.subject != f"drill/{wish.id}":
                continue
            if event.kind == "DrillRefused":
                raise InvalidInputError(f"the agent of {host} refused: {event.message}")
            return
        await asyncio.sleep(_POLL_S)
    raise InvalidInputError(
        f"the agent of {host} did not take the drill's wish: look at `redmesh get hosts`"
    )


async def by_redis(drill: Drill, registry: Registry, hold_s: float) -> Injection:
    """Disturb Redis by its own commands; raises when it does not let us."""
    command = registry.connection.command
    if "+cluster" in registry.connection.shown_url:
        raise cannot(drill, "a Redis Cluster is disturbed node by node: use its own tools")

    async def disconnect() -> None:
        cut = await command("CLIENT", "KILL", "TYPE", "pubsub")
        cut += await command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        cutting.seen = f"{cut} were cut" if cut else ""

    async def pause() -> None:
        await command("CLIENT", "PAUSE", round(hold_s * 1000), "ALL")

    async def nothing() -> None:
        """Redis ends the pause by itself; it hears nobody until then."""

    async def failover() -> None:
        await command("FAILOVER", "TIMEOUT", 5000)

    cutting = Injection("CLIENT KILL of every connection to Redis", Struck(), disconnect)
    match drill.fault:
        case Fault.REDIS_DISCONNECT:
            return cutting
        case Fault.REDIS_AWAY:
            told = f"CLIENT PAUSE for {hold_s:g} s: Redis answers nobody"
            return Injection(told, Struck(), pause, heal=nothing)
        case _:
            if "+sentinel" in registry.connection.shown_url:
                raise cannot(drill, "Sentinels decide there: `SENTINEL FAILOVER NAME` on one")
            info = info_of(await command("INFO", "replication"))
            if info.get("role") != "master" or int(info.get("connected_slaves", "0")) < 1:
                raise cannot(
                    drill,
                    "its Redis has no replica that could become primary; a local mesh gets one "
                    "by `redmesh up --links`",
                )
            return Injection("FAILOVER to a replica of Redis", Struck(), failover)


def by_declaring(scene: Scene, registry: Registry) -> Injection:
    """Roll a new revision that differs in nothing that matters, and then the old one again."""
    before = scene.deployment.spec
    engine = msgspec.structs.replace(
        before.engine, startup_timeout_s=before.engine.startup_timeout_s + 1
    )
    after = msgspec.structs.replace(before, engine=engine)

    async def declare(spec: DeploymentSpec, what: str) -> None:
        def decide(current: Deployment, now_ms: int) -> Deployment:
            return msgspec.structs.replace(
                current,
                spec=spec,
                generation=current.generation + 1,
                updated_ms=now_ms,
                updated_by=author(),
            )

        await change(registry, scene.model, decide, what)

    async def roll() -> None:
        await declare(after, "a drill rolls a revision that differs in nothing that matters")

    async def back() -> None:
        await declare(before, "the drill rolls the revision from before again")

    told = f"revision {after.revision()} of {scene.model} instead of {before.revision()}"
    return Injection(told, Struck(revision=after.revision()), roll, heal=back)
