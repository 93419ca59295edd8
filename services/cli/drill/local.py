"""Injects faults into the processes of a mesh that `redmesh up` runs on this machine, by signals.

A signal goes only to a process that carries the mesh's mark: a pid alone could be anybody's.
"""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from typing import Final

from services.cli import processes
from services.cli.drill.catalogue import Drill, Fault
from services.cli.drill.injection import Injection, cannot
from services.cli.drill.records import Struck
from services.cli.drill.scene import Scene
from services.cli.statedir import Mesh, StateDir
from shared.errors import InvalidInputError
from shared.models.host import Member, MemberKind
from shared.models.replica import Replica

FAULTS: Final = frozenset(
    {
        Fault.REPLICA_KILL,
        Fault.REPLICA_FREEZE,
        Fault.AGENT_KILL,
        Fault.HOST_LOSS,
        Fault.PROXY_KILL,
        Fault.PROXY_DRAIN,
        Fault.LEADER_KILL,
        Fault.LEADER_FREEZE,
        Fault.REDIS_RESTART,
        Fault.REDIS_EMPTY,
        Fault.REDIS_AWAY,
    }
)
"""What signals can do."""


def prepare(drill: Drill, scene: Scene) -> Injection:
    """Make the fault ready; raise `InvalidInputError` when this mesh has not what it needs."""
    mesh, state = scene.mesh, scene.state
    if mesh is None or state is None:
        raise cannot(drill, "its processes do not run on this machine")
    signals = Signals(mesh)
    members: dict[Fault, tuple[Callable[[], Member], signal.Signals]] = {
        Fault.AGENT_KILL: (scene.victim_agent, signal.SIGKILL),
        Fault.PROXY_KILL: (scene.victim_proxy, signal.SIGKILL),
        Fault.PROXY_DRAIN: (scene.victim_proxy, signal.SIGTERM),
        Fault.LEADER_KILL: (scene.victim_leader, signal.SIGKILL),
    }
    if drill.fault in members:
        choose, number = members[drill.fault]
        return _member(choose(), signals, number)
    match drill.fault:
        case Fault.REPLICA_KILL | Fault.REPLICA_FREEZE:
            return _replica(drill.fault, scene.victim_replica(), signals)
        case Fault.LEADER_FREEZE:
            return _frozen_leader(scene.victim_leader(), signals)
        case Fault.HOST_LOSS:
            return _host(scene, scene.victim_host(), signals)
        case _:
            return _redis(drill, mesh, state, signals)


class Signals:
    """Sends signals to processes of one mesh, and to no others."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def check(self, *pids: int) -> None:
        """Raise `InvalidInputError` unless every pid is a process of the mesh now."""
        ours = {ref.pid for ref in processes.marked(self._mesh.id)}
        # A server that changes its title may hide its mark: those are known by their start time.
        ours |= {ref.pid for ref in self._mesh.running.values() if processes.alive(ref)}
        for pid in pids:
            if pid not in ours:
                raise InvalidInputError(
                    f"pid {pid} is no process of the mesh of this state directory: it ended, or "
                    "runs elsewhere. Look again with `redmesh get replicas`"
                )

    def process(self, pid: int, number: signal.Signals) -> None:
        """Signal one process; one that has ended is no error."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def tree(self, pid: int, number: signal.Signals) -> None:
        """Signal an engine's whole process group: vLLM is several processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)


def _replica(fault: Fault, victim: Replica, signals: Signals) -> Injection:
    signals.check(victim.pid)
    struck = Struck(replicas=frozenset({victim.rid}))
    where = f"the engine of {victim.rid} on {victim.host} (pid {victim.pid})"

    async def kill() -> None:
        signals.tree(victim.pid, signal.SIGKILL)

    async def freeze() -> None:
        signals.tree(victim.pid, signal.SIGSTOP)

    async def thaw() -> None:
        signals.tree(victim.pid, signal.SIGCONT)

    if fault is Fault.REPLICA_KILL:
        return Injection(f"SIGKILL to {where}", struck, kill)
    return Injection(f"SIGSTOP to {where}", struck, freeze, heal=thaw)


def _member(victim: Member, signals: Signals, number: signal.Signals) -> Injection:
    signals.check(victim.pid)

    async def strike() -> None:
        signals.process(victim.pid, number)

    return Injection(f"{number.name} to {_named(victim)}", struck_member(victim), strike)


def _frozen_leader(victim: Member, signals: Signals) -> Injection:
    signals.check(victim.pid)

    async def freeze() -> None:
        signals.process(victim.pid, signal.SIGSTOP)

    async def thaw() -> None:
        signals.process(victim.pid, signal.SIGCONT)

    told = f"SIGSTOP to {_named(victim)}"
    return Injection(told, struck_member(victim), freeze, heal=thaw)


def _host(scene: Scene, host: str, signals: Signals) -> Injection:
    """Freeze the agent, so that nobody starts it again, and kill its engines."""
    agent = next(member for member in scene.members if member.id == host)
    victims = [replica for replica in scene.replicas.values() if replica.host == host]
    signals.check(agent.pid, *(replica.pid for replica in victims))

    async def strike() -> None:
        signals.process(agent.pid, signal.SIGSTOP)
        for replica in victims:
            signals.tree(replica.pid, signal.SIGKILL)

    async def heal() -> None:
        signals.process(agent.pid, signal.SIGKILL)  # its supervisor starts it again

    told = (
        f"SIGKILL to {len(victims)} engines of the host {host}, and its agent (pid {agent.pid}) "
        "silenced"
    )
    struck = Struck(
        replicas=frozenset(replica.rid for replica in victims), member=agent.field, pid=agent.pid
    )
    return Injection(told, struck, strike, heal=heal)


def _redis(drill: Drill, mesh: Mesh, state: StateDir, signals: Signals) -> Injection:
    server = mesh.running.get("redis")
    if server is None:
        raise cannot(drill, "its Redis was not started by `redmesh up`, so it cannot be killed")
    signals.check(server.pid)
    told = f"Redis (pid {server.pid}, port {mesh.redis_port})"

    async def kill() -> None:
        signals.process(server.pid, signal.SIGKILL)

    async def empty() -> None:
        # The server goes on writing to the unlinked files; its successor finds none.
        for folder in state.redis.glob("appendonly*"):
            await asyncio.to_thread(shutil.rmtree, folder)
        await kill()

    async def freeze() -> None:
        signals.process(server.pid, signal.SIGSTOP)

    async def thaw() -> None:
        signals.process(server.pid, signal.SIGCONT)

    match drill.fault:
        case Fault.REDIS_RESTART:
            return Injection(f"SIGKILL to {told}; its supervisor starts it again", Struck(), kill)
        case Fault.REDIS_EMPTY:
            return Injection(f"{told} loses its files and gets SIGKILL", Struck(), empty)
        case _:
            return Injection(f"SIGSTOP to {told}: it answers nobody", Struck(), freeze, heal=thaw)


def struck_member(victim: Member) -> Struck:
    """Describe a struck process of the fleet."""
    return Struck(
        member=victim.field,
        pid=victim.pid,
        proxy_url=victim.url if victim.kind is MemberKind.PROXY else "",
        leader=victim.id if victim.kind is MemberKind.CONTROLLER else "",
    )


def _named(victim: Member) -> str:
    return f"the {victim.kind} {victim.id} (pid {victim.pid} on {victim.host})"
