"""Reads what the commands show and judge: the registry's content and the admin ports' answers."""

import asyncio
from collections.abc import Iterable, Sequence

import msgspec

from services.cli.readiness import Observed, ProxyView
from shared import admin
from shared.models.event import Event
from shared.models.host import Member, MemberKind
from shared.models.replica import Replica, ReplicaState
from shared.registry import Registry

ALIVE_MS = 5000
"""A member that has beaten within this time is alive."""

ADMIN_DEADLINE_S = 2.0


class LiveRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request as its proxy knows it."""

    rid: str
    cost_tokens: int
    age_ms: float = 0
    streamed: bool = False


class LiveTable(msgspec.Struct, frozen=True, kw_only=True):
    """A model's routing table in one proxy."""

    ver: int = 0
    authoritative: bool = False
    replicas: dict[str, str] = msgspec.field(default_factory=dict[str, str])


class LiveReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a proxy answers on `/live/requests`."""

    proxy: str
    requests: dict[str, dict[str, LiveRequest]] = msgspec.field(
        default_factory=dict[str, dict[str, LiveRequest]]
    )
    table: dict[str, LiveTable] = msgspec.field(default_factory=dict[str, LiveTable])
    breaker: str = "closed"


async def live_report(member: Member) -> LiveReport:
    """Ask a proxy for its live requests; raise OSError or ValueError when it gives none."""
    body = await admin.fetch(f"{member.admin_url}/live/requests", deadline_s=ADMIN_DEADLINE_S)
    return msgspec.json.decode(body, type=LiveReport)


async def health_problem(member: Member) -> str | None:
    """Ask a member whether it is ready; None when it is, else why it is not."""
    try:
        await admin.fetch(f"{member.admin_url}/health/ready", deadline_s=ADMIN_DEADLINE_S)
    except OSError as error:
        return f"does not answer on {member.admin_url}: {error.strerror or type(error).__name__}"
    except ValueError as error:
        return f"is not ready: {error}"
    return None


async def members(registry: Registry, kind: MemberKind) -> list[Member]:
    """Read the members of `kind` that are alive."""
    return [
        seen.member
        for seen in (await registry.fleet.members()).values()
        if seen.member.kind is kind and seen.seen_ms_ago < ALIVE_MS
    ]


async def replicas_of(registry: Registry, models: Iterable[str]) -> dict[str, tuple[Replica, ...]]:
    """Read the replicas of `models`."""
    return {
        model: tuple((await registry.replicas.snapshot(model)).replicas.values())
        for model in models
    }


async def all_replicas(registry: Registry) -> list[Replica]:
    """Read every replica of every declared deployment."""
    models = sorted(await registry.fleet.deployments())
    found = await replicas_of(registry, models)
    return [replica for model in models for replica in found[model]]


async def look(
    registry: Registry,
    models: Sequence[str],
    *,
    proxy_urls: Sequence[str],
    hosts: Sequence[str],
    since_id: str | None,
) -> Observed:
    """Look once at a starting mesh: `models` of it, its proxies and its agents."""
    deployments = await registry.fleet.deployments()
    wanted = {model: deployments[model].replicas for model in models if model in deployments}
    alive = [
        seen.member
        for seen in (await registry.fleet.members()).values()
        if seen.seen_ms_ago < ALIVE_MS
    ]
    by_url = {member.url.rstrip("/"): member for member in alive if member.kind is MemberKind.PROXY}
    views = await asyncio.gather(*(_view(url, by_url.get(url)) for url in proxy_urls))
    events = await registry.fleet.events(200, since_id)
    return Observed(
        wanted=wanted,
        replicas=await replicas_of(registry, wanted),
        proxies=tuple(views),
        agents=sum(member.kind is MemberKind.AGENT and member.id in hosts for member in alive),
        agents_wanted=len(hosts),
        leader=bool(await leader_of(registry)),
        events=tuple(events),
    )


async def _view(url: str, member: Member | None) -> ProxyView:
    if member is None:
        return ProxyView(url=url, problem="has not registered yet")
    problem = await health_problem(member)
    if problem is not None:
        return ProxyView(url=url, problem=problem)
    try:
        report = await live_report(member)
    except (OSError, ValueError) as error:
        return ProxyView(url=url, problem=str(error))
    return ProxyView(url=url, ready_replicas=_ready_counts(report))


def _ready_counts(report: LiveReport) -> dict[str, int]:
    return {
        model: sum(state == ReplicaState.READY for state in table.replicas.values())
        for model, table in report.table.items()
    }


async def leader_of(registry: Registry) -> str:
    """Name the leader; "" when nobody leads."""
    owner: bytes | str | None = await registry.connection.command(
        "HGET", registry.keys.fleet.leader, "id"
    )
    return owner.decode(errors="replace") if isinstance(owner, bytes) else owner or ""


def info_of(reply: object) -> dict[str, str]:
    """Read a reply to INFO, whether the client library has parsed it or not."""
    if isinstance(reply, dict):
        return {str(name): str(value) for name, value in reply.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType] - any reply
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else str(reply)
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in pairs}


async def last_event_id(registry: Registry) -> str | None:
    """Name the newest event, to ask later for those after it."""
    newest: list[Event] = await registry.fleet.events(1)
    return newest[-1].id if newest else None
