"""The mesh as it stands before a drill, and the choice of what the fault shall hit.

A drill needs a whole mesh: what was broken before cannot be told from what the fault broke. So a
drill refuses to begin on anything less, and says what is missing.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from services.cli import processes
from services.cli.drill.catalogue import Facts
from services.cli.drill.options import Target
from services.cli.observing import ALIVE_MS, leader_of
from services.cli.statedir import Mesh, StateDir
from shared.errors import InvalidInputError
from shared.models.deployment import Deployment, EngineKind
from shared.models.host import Host, Member, MemberKind
from shared.models.replica import ENDED, Replica, ReplicaState
from shared.registry import Registry

LEASE_S: Final = 5.0
"""The lease's time where no renewal of it is seen."""
RENEWED_S: Final = 2.0
"""Within this a leader renews its lease: it does so each second."""
LOOK_S: Final = 0.02
"""Between two looks at what is left of a lease."""


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """One model's mesh: who serves it, and who leads."""

    model: str
    deployment: Deployment
    replicas: dict[str, Replica]
    """READY ones."""
    members: tuple[Member, ...]
    """Processes that beat."""
    hosts: dict[str, Host]
    leader: str
    lease_s: float = LEASE_S
    """How long leadership lasts without a renewal."""
    target: Target
    mesh: Mesh | None = None
    """What `redmesh up` started here, if this is such a mesh."""
    state: StateDir | None = None

    def of(self, kind: MemberKind) -> list[Member]:
        """Name the members of one kind, in a stable order."""
        return sorted((m for m in self.members if m.kind is kind), key=lambda m: (m.url, m.id))

    @property
    def counts(self) -> dict[MemberKind, int]:
        """Count the members of each kind."""
        return {kind: len(self.of(kind)) for kind in MemberKind}

    def told(self) -> str:
        """Say how large it is."""
        parts = [f"{len(self.replicas)} replicas of {self.model}"]
        for kind, count in self.counts.items():
            several = "proxies" if kind is MemberKind.PROXY else f"{kind}s"
            parts.append(f"{count} {kind if count == 1 else several}")
        return ", ".join(parts)

    def facts(self) -> Facts:
        """Give what budgets depend on."""
        spec = self.deployment.spec
        return Facts(
            lease_s=self.lease_s,
            silence_s=spec.routing.inter_byte_timeout_s,
            startup_s=90.0 if spec.engine.kind is EngineKind.SIM else spec.engine.startup_timeout_s,
        )

    def need(self, kind: MemberKind, count: int, why: str) -> list[Member]:
        """Give the members of a kind; raise `InvalidInputError` when there are too few."""
        found = self.of(kind)
        if len(found) < count:
            raise InvalidInputError(
                f"this drill needs {count} of kind {kind}, and {len(found)} beat: {why}"
            )
        return found

    def victim_replica(self) -> Replica:
        """Choose the replica to strike: the named one, else the first by name."""
        if len(self.replicas) < 2:
            raise InvalidInputError(
                f"this drill needs 2 READY replicas of {self.model}, so that streams can go on: "
                f"`redmesh scale {self.model} 2` makes them"
            )
        wanted = self.target.replica
        chosen = [r for rid, r in sorted(self.replicas.items()) if wanted in {"", rid}]
        if self.target.host:
            chosen = [r for r in chosen if r.host == self.target.host]
        chosen = [r for r in chosen if r.kind is not EngineKind.EXTERNAL]
        if not chosen:
            raise InvalidInputError(
                f"--target: no READY replica of {self.model} is "
                f"{wanted or 'one that an agent runs'}; there are: "
                f"{', '.join(f'{rid} on {r.host}' for rid, r in sorted(self.replicas.items()))}",
                field="--target",
            )
        return chosen[0]

    def victim_proxy(self) -> Member:
        """Choose the proxy to strike: the named one, by name or URL, else the first."""
        found = self.need(
            MemberKind.PROXY, 2, "clients must have another one (`redmesh up --proxies 2`)"
        )
        wanted = self.target.proxy.rstrip("/")
        chosen = [m for m in found if wanted in {"", m.id, m.url.rstrip("/")}]
        if not chosen:
            raise InvalidInputError(
                f"--target proxy={wanted}: there is none; there are: "
                f"{', '.join(f'{m.id} ({m.url})' for m in found)}",
                field="--target",
            )
        return chosen[0]

    def victim_leader(self) -> Member:
        """Find the leading controller."""
        found = self.need(
            MemberKind.CONTROLLER, 2, "a standby must take over (`redmesh up --controllers 2`)"
        )
        for member in found:
            if member.id == self.leader:
                return member
        raise InvalidInputError(f"the leader {self.leader!r} does not beat: look at `redmesh get`")

    def victim_host(self) -> str:
        """Choose the host to strike: the named one, else the one with fewest replicas."""
        counts: dict[str, int] = {}
        for replica in self.replicas.values():
            counts[replica.host] = counts.get(replica.host, 0) + 1
        wanted = self.target.host
        if wanted and wanted not in counts:
            raise InvalidInputError(
                f"--target host={wanted}: it has no READY replica of {self.model}; hosts that "
                f"have: {', '.join(sorted(counts)) or 'none'}",
                field="--target",
            )
        if len(counts) < 2:
            raise InvalidInputError(
                f"this drill needs replicas of {self.model} on 2 hosts, so that something is left "
                "(`redmesh up --hosts 2`)"
            )
        return wanted or min(counts, key=lambda host: (counts[host], host))

    def victim_agent(self) -> Member:
        """Choose the agent to strike: of the named host, else the first with a replica."""
        wanted = self.target.host
        with_replicas = {replica.host for replica in self.replicas.values()}
        found = [
            m
            for m in self.need(MemberKind.AGENT, 1, "none beats")
            if (m.id == wanted if wanted else m.id in with_replicas)
        ]
        if not found:
            raise InvalidInputError(
                f"--target host={wanted}: no agent of that host beats", field="--target"
            )
        return found[0]


async def look(registry: Registry, state: StateDir, target: Target) -> Scene:
    """Look at the mesh; raise `InvalidInputError` that lists what is not as it must be."""
    deployments = {
        name: each
        for name, each in (await registry.fleet.deployments()).items()
        if not each.deleted
    }
    model = _model(list(deployments), target)
    replicas = (await registry.replicas.snapshot(model)).replicas
    members = tuple(
        seen.member
        for seen in (await registry.fleet.members()).values()
        if seen.seen_ms_ago < ALIVE_MS
    )
    ready = {rid: r for rid, r in replicas.items() if r.state is ReplicaState.READY}
    leader = await leader_of(registry)
    _check_whole(deployments[model], replicas, members, leader)
    mesh = local_mesh(state, members)
    return Scene(
        model=model,
        deployment=deployments[model],
        replicas=ready,
        members=members,
        hosts=dict(await registry.fleet.hosts()),
        leader=leader,
        lease_s=await lease_s(registry),
        target=target,
        mesh=mesh,
        state=state if mesh is not None else None,
    )


async def lease_s(registry: Registry) -> float:
    """Tell how long the leader's lease is: what is left of it just after a renewal.

    Rounded up to a tenth of a second, since a look comes a little later than the renewal.
    """
    before_ms = 0
    until_s = time.monotonic() + RENEWED_S
    while time.monotonic() < until_s:
        left_ms: int = await registry.connection.command("PTTL", registry.keys.fleet.leader)
        if 0 < before_ms < left_ms:
            return math.ceil(left_ms / 100) / 10
        before_ms = left_ms
        await asyncio.sleep(LOOK_S)
    return LEASE_S


def local_mesh(state: StateDir, members: Sequence[Member]) -> Mesh | None:
    """Give the mesh of the state directory, if it is the one that beats in this Redis."""
    mesh = state.read_mesh()
    if mesh is None or not processes.alive(mesh.supervisor):
        return None
    ours = {ref.pid for ref in mesh.running.values()}
    return mesh if any(member.pid in ours for member in members) else None


def is_whole(
    deployment: Deployment, replicas: dict[str, Replica], members: Sequence[Member], leader: str
) -> bool:
    """Tell whether all is as wanted."""
    return not _missing(deployment, replicas, members, leader)


def _model(declared: list[str], target: Target) -> str:
    known = ", ".join(sorted(declared)) or "none"
    if target.model:
        if target.model in declared:
            return target.model
        raise InvalidInputError(
            f"--target model={target.model}: not declared; there are: {known}", field="--target"
        )
    if len(declared) == 1:
        return declared[0]
    raise InvalidInputError(
        f"--target model=NAME says which model the drill shall use; there are: {known}",
        field="--target",
    )


def _check_whole(
    deployment: Deployment, replicas: dict[str, Replica], members: Sequence[Member], leader: str
) -> None:
    missing = _missing(deployment, replicas, members, leader)
    if missing:
        raise InvalidInputError(
            "the mesh is not whole before the drill, so that its faults could not be told from "
            f"the drill's: {'; '.join(missing)}. Look at `redmesh get replicas` and "
            "`redmesh doctor`"
        )


def _missing(
    deployment: Deployment, replicas: dict[str, Replica], members: Sequence[Member], leader: str
) -> list[str]:
    missing: list[str] = []
    living = [r for r in replicas.values() if r.state not in ENDED]
    ready = [r for r in living if r.state is ReplicaState.READY]
    if len(ready) != deployment.replicas:
        missing.append(f"{len(ready)} of {deployment.replicas} replicas are READY")
    missing += [f"{r.rid} is {r.state}" for r in living if r.state is not ReplicaState.READY]
    revision = deployment.spec.revision()
    missing += [f"{r.rid} is of an old revision" for r in ready if r.revision != revision]
    if not leader:
        missing.append("no controller leads")
    missing += [
        f"no {kind} beats" for kind in MemberKind if not any(m.kind is kind for m in members)
    ]
    return missing
