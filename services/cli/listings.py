"""What `redmesh get` can list: each kind is read from the registry and laid out once."""

from collections.abc import Awaitable, Callable
from types import MappingProxyType
from typing import Any, Final

import msgspec

from services.cli.observing import ALIVE_MS, leader_of
from services.cli.tables import Listing, age, gib
from shared.errors import NotFoundError
from shared.models.event import Event, EventLevel
from shared.models.host import Hold, MemberKind
from shared.models.replica import ENDED, ReplicaState
from shared.registry import Registry

EVENTS_SHOWN: Final = 30


async def models(registry: Registry, only: str | None) -> list[str]:
    """Name the models to look at: the one asked for (by name or alias), or all that are declared.

    Raises NotFoundError when the one asked for is not declared.
    """
    deployments = await registry.fleet.deployments()
    if only is None:
        return sorted(deployments)
    for name, deployment in deployments.items():
        if only in (name, *deployment.spec.aliases):
            return [name]
    known = ", ".join(sorted(deployments)) or "none"
    raise NotFoundError(f"there is no deployment {only!r}; declared are: {known}")


async def deployments(registry: Registry, only: str | None) -> Listing:
    """List declared deployments."""
    found = await registry.fleet.deployments()
    now_ms = await registry.replicas.server_time_ms()
    rows: list[tuple[str, ...]] = []
    records: list[object] = []
    for model in await models(registry, only):
        deployment = found[model]
        replicas = (await registry.replicas.snapshot(model)).replicas.values()
        ready = sum(replica.state is ReplicaState.READY for replica in replicas)
        totals = (await registry.ledger.totals(model))["*"]
        record = _plain(deployment)
        record.update(ready=ready, requests=totals.requests, cost_tokens=totals.cost_tokens)
        records.append({"model": model, **record})
        rows.append(
            (
                model,
                f"{ready}/{deployment.replicas}",
                "deleting" if deployment.deleted else str(deployment.spec.engine.kind),
                str(totals.requests),
                deployment.spec.revision(),
                str(deployment.generation),
                age(now_ms - deployment.updated_ms),
            )
        )
    return Listing(
        columns=("MODEL", "READY", "ENGINE", "REQUESTS", "REVISION", "GENERATION", "CHANGED"),
        rows=rows,
        records=records,
        empty="no deployments: declare some with `redmesh apply -f FILE`",
    )


async def replicas(registry: Registry, only: str | None) -> Listing:
    """List replicas with what is outstanding on each."""
    now_ms = await registry.replicas.server_time_ms()
    rows: list[tuple[str, ...]] = []
    records: list[object] = []
    for model in await models(registry, only):
        snapshot = await registry.replicas.snapshot(model)
        totals = await registry.ledger.totals(model)
        for replica in sorted(snapshot.replicas.values(), key=lambda each: each.rid):
            load = totals.get(replica.rid)
            record = _plain(replica)
            record.update(
                requests=load.requests if load else 0,
                cost_tokens=load.cost_tokens if load else 0,
            )
            records.append(record)
            rows.append(
                (
                    replica.rid,
                    model,
                    replica.state,
                    age(now_ms - replica.since_ms),
                    replica.host,
                    str(load.requests if load else 0),
                    replica.url.removeprefix("http://"),
                )
            )
        for rid in snapshot.corrupt:
            records.append({"rid": rid, "model": model, "corrupt": True})
            rows.append((rid, model, "does not parse", "", "", "", ""))
    return Listing(
        columns=("REPLICA", "MODEL", "STATE", "FOR", "HOST", "REQ", "ADDRESS"),
        rows=rows,
        records=records,
        empty="no replicas",
    )


async def hosts(registry: Registry, only: str | None) -> Listing:
    """List hosts with their agents and holds; with a model, those that run a replica of it."""
    found = await registry.fleet.hosts()
    holds = await registry.fleet.holds()
    members = await registry.fleet.members()
    running: dict[str, int] = {}
    for model in await models(registry, only):
        for replica in (await registry.replicas.snapshot(model)).replicas.values():
            if replica.state not in ENDED:
                running[replica.host] = running.get(replica.host, 0) + 1
    rows: list[tuple[str, ...]] = []
    records: list[object] = []
    for name, host in sorted(found.items()):
        if only is not None and name not in running:
            continue
        seen = members.get(f"{MemberKind.AGENT}:{name}")
        hold = held(holds.get(f"host:{name}"))
        record = _plain(host)
        record.update(
            replicas=running.get(name, 0),
            hold=hold,
            seen_ms_ago=seen.seen_ms_ago if seen else None,
        )
        records.append(record)
        rows.append(
            (
                name,
                host.address,
                f"{host.cpus:g}",
                gib(host.memory_bytes),
                str(len(host.gpus)),
                str(running.get(name, 0)),
                _seen(seen.seen_ms_ago if seen else None),
                hold,
            )
        )
    return Listing(
        columns=("HOST", "ADDRESS", "CPUS", "MEMORY", "GPUS", "REPLICAS", "AGENT", "HOLD"),
        rows=rows,
        records=records,
        empty="no hosts: start an agent with `redmesh agent`",
    )


def _members(kind: MemberKind, title: str) -> Callable[[Registry, str | None], Awaitable[Listing]]:
    async def read(registry: Registry, only: str | None) -> Listing:
        del only
        leader = await leader_of(registry) if kind is MemberKind.CONTROLLER else ""
        rows: list[tuple[str, ...]] = []
        records: list[object] = []
        now_ms = await registry.replicas.server_time_ms()
        for _, seen in sorted((await registry.fleet.members()).items()):
            member = seen.member
            if member.kind is not kind:
                continue
            role = "leader" if member.id == leader else "standby"
            record = _plain(member)
            record["seen_ms_ago"] = seen.seen_ms_ago
            if kind is MemberKind.CONTROLLER:
                record["role"] = role
            records.append(record)
            where = role if kind is MemberKind.CONTROLLER else member.url
            rows.append(
                (
                    member.id,
                    where,
                    _seen(seen.seen_ms_ago),
                    age(now_ms - member.started_ms),
                    str(member.pid),
                    member.admin_url.removeprefix("http://"),
                )
            )
        second = "ROLE" if kind is MemberKind.CONTROLLER else "URL"
        return Listing(
            columns=(title, second, "STATUS", "UP", "PID", "ADMIN"),
            rows=rows,
            records=records,
            empty=f"no {kind} has registered",
        )

    return read


async def reservations(registry: Registry, only: str | None) -> Listing:
    """List every reservation of the ledger."""
    rows: list[tuple[str, ...]] = []
    records: list[object] = []
    for model in await models(registry, only):
        for proxy in sorted(await registry.ledger.proxies(model)):
            for request, lease in sorted((await registry.ledger.leases(model, proxy)).items()):
                record = _plain(lease)
                record.update(model=model, proxy=proxy)
                records.append(record)
                rows.append((request[:12], model, lease.rid, proxy, str(lease.cost_tokens)))
    return Listing(
        columns=("REQUEST", "MODEL", "REPLICA", "PROXY", "COST (TOKENS)"),
        rows=rows,
        records=records,
        empty="no reservations: nothing is in flight",
    )


async def events(registry: Registry, only: str | None) -> Listing:
    """List the last events; with a model, those of the deployment and its replicas."""
    now_ms = await registry.replicas.server_time_ms()
    found = await registry.fleet.events(EVENTS_SHOWN if only is None else 1000)
    if only is not None:
        wanted: set[str] = set()
        for model in await models(registry, only):
            snapshot = await registry.replicas.snapshot(model)
            wanted |= {f"deployment/{model}", *(f"replica/{rid}" for rid in snapshot.replicas)}
        found = [event for event in found if event.subject in wanted][-EVENTS_SHOWN:]
    return Listing(
        columns=("AGO", "KIND", "WHAT"),
        rows=[
            (age(now_ms - each.at_ms), each.kind, f"{each.subject}: {remark(each)}")
            for each in found
        ],
        records=[_plain(event) for event in found],
        empty="no events",
        wraps="WHAT",
    )


def remark(event: Event) -> str:
    """Write an event's message; a warning or an error says so."""
    if event.level is EventLevel.INFO:
        return event.message
    return f"{event.message} [{event.level}]"


def held(hold: Hold | None) -> str:
    """Say what a hold asks for."""
    if hold is None:
        return ""
    return "draining" if hold.drain else "cordoned"


def _seen(ms_ago: int | None) -> str:
    if ms_ago is None:
        return "never seen"
    return "alive" if ms_ago < ALIVE_MS else f"silent {age(ms_ago)}"


def _plain(record: msgspec.Struct) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(record)
    return plain


KINDS: Final = MappingProxyType(
    {
        "deployments": deployments,
        "replicas": replicas,
        "hosts": hosts,
        "proxies": _members(MemberKind.PROXY, "PROXY"),
        "controllers": _members(MemberKind.CONTROLLER, "CONTROLLER"),
        "reservations": reservations,
        "events": events,
    }
)
"""Kind → its reader."""
