"""Commands that change what is wanted: scale, delete, cordon, uncordon, drain.

They write wishes; the controller and the agents make them true. Only `drain --wait` waits.
"""

import asyncio
import time
from typing import Final

import click
import msgspec

from services.cli.declaring import author, change, later, scaled
from services.cli.observing import all_replicas
from services.cli.session import Session, common_options
from services.cli.showing import Shower, shower
from shared.errors import NotFoundError, RedmeshError
from shared.models.deployment import Deployment
from shared.models.event import Event
from shared.models.host import Hold
from shared.models.replica import ENDED
from shared.registry import Registry

_POLL_S: Final = 0.5


@click.command("scale")
@click.argument("model")
@click.argument("count", metavar="N", type=click.IntRange(0, 10_000))
@common_options
def scale_command(session: Session, *, model: str, count: int) -> int:
    """Set how many replicas MODEL has, within the bounds of its models file."""

    async def act(registry: Registry) -> int:
        def decide(current: Deployment, now_ms: int) -> Deployment:
            return scaled(current, count, at_ms=now_ms, by=author())

        done = await change(registry, model, decide, f"scaled to {count} replicas")
        click.echo(f"deployment/{done.spec.name} scaled to {count}")
        return 0

    return session.run(act)


@click.command("delete")
@click.argument("model")
@common_options
def delete_command(session: Session, *, model: str) -> int:
    """Drain all replicas of MODEL and forget the deployment."""

    async def act(registry: Registry) -> int:
        def decide(current: Deployment, now_ms: int) -> Deployment:
            return msgspec.structs.replace(
                current,
                deleted=True,
                replicas=0,
                generation=current.generation + 1,
                updated_ms=later(current, now_ms),
                updated_by=author(),
            )

        done = await change(registry, model, decide, "marked for deletion")
        click.echo(f"deployment/{done.spec.name} is being drained, then forgotten")
        return 0

    return session.run(act)


@click.command("cordon")
@click.argument("host")
@common_options
def cordon_command(session: Session, *, host: str) -> int:
    """Place no new replicas on HOST; what runs there goes on."""

    async def act(registry: Registry) -> int:
        name = host.removeprefix("host/")
        await _check_host(registry, name)
        await _hold(registry, "host", name, drain=False)
        click.echo(f"host/{name} cordoned")
        return 0

    return session.run(act)


@click.command("uncordon")
@click.argument("what", metavar="HOST|REPLICA")
@common_options
def uncordon_command(session: Session, *, what: str) -> int:
    """Take back cordon and drain. A replica that is DRAINING already is replaced all the same."""

    async def act(registry: Registry) -> int:
        dropped = False
        for kind in ("host", "replica"):
            name = what.removeprefix(f"{kind}/")
            if await registry.fleet.drop_hold(f"{kind}:{name}"):
                dropped = True
                await _tell(registry, kind, name, f"{kind.capitalize()}Uncordoned", "uncordoned")
                click.echo(f"{kind}/{name} uncordoned")
        if not dropped:
            held = ", ".join(sorted(await registry.fleet.holds())) or "nothing"
            raise NotFoundError(f"{what!r} is neither cordoned nor drained; held are: {held}")
        return 0

    return session.run(act)


@click.command("drain")
@click.argument("what", metavar="HOST|REPLICA")
@click.option("--wait", is_flag=True, help="Return when nothing is left to drain.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(1, 86_400), default=600.0, show_default=True
)
@common_options
def drain_command(session: Session, *, what: str, wait: bool, timeout_s: float) -> int:
    """Move everything off a host, or replace one replica; requests in flight finish."""

    async def act(registry: Registry) -> int:
        kind, name = await _host_or_replica(registry, what)
        await _hold(registry, kind, name, drain=True)
        click.echo(f"{kind}/{name} is draining")
        if wait:
            with shower() as show:
                await _wait_drained(registry, kind, name, timeout_s, show)
            click.echo(f"{kind}/{name} drained")
        return 0

    return session.run(act)


async def _wait_drained(
    registry: Registry, kind: str, name: str, timeout_s: float, show: Shower
) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        left = [
            replica
            for replica in await all_replicas(registry)
            if replica.state not in ENDED
            and (replica.host == name if kind == "host" else replica.rid == name)
        ]
        if not left:
            return
        listed = ", ".join(f"{replica.rid} {replica.state}" for replica in left)
        show.now(f"left: {listed}")
        if time.monotonic() >= deadline_s:
            raise RedmeshError(
                f"not drained within {timeout_s:g} s, left are: {listed}. The drain goes on; "
                "`redmesh get reservations` shows what is in flight"
            )
        await asyncio.sleep(_POLL_S)


async def _host_or_replica(registry: Registry, what: str) -> tuple[str, str]:
    hosts = await registry.fleet.hosts()
    rids = [replica.rid for replica in await all_replicas(registry)]
    for kind, names in (("host", list(hosts)), ("replica", rids)):
        name = what.removeprefix(f"{kind}/")
        if name in names:
            return kind, name
    raise NotFoundError(
        f"there is no host or replica {what!r}; hosts are: {', '.join(sorted(hosts)) or 'none'}; "
        f"replicas are: {', '.join(sorted(rids)) or 'none'}"
    )


async def _check_host(registry: Registry, name: str) -> None:
    hosts = await registry.fleet.hosts()
    if name not in hosts:
        known = ", ".join(sorted(hosts)) or "none"
        raise NotFoundError(f"there is no host {name!r}; there are: {known}")


async def _hold(registry: Registry, kind: str, name: str, *, drain: bool) -> None:
    now_ms = await registry.replicas.server_time_ms()
    await registry.fleet.put_hold(
        Hold(subject=f"{kind}:{name}", drain=drain, since_ms=now_ms, by=author())
    )
    done = "Draining" if drain else "Cordoned"
    await _tell(registry, kind, name, f"{kind.capitalize()}{done}", done.lower())


async def _tell(registry: Registry, kind: str, name: str, event: str, what: str) -> None:
    await registry.fleet.emit(
        Event(kind=event, subject=f"{kind}/{name}", message=f"{what} by {author()}", source="cli")
    )
