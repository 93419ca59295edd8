"""`redmesh production`: mark a fleet on which real users depend, so that drills ask twice."""

import click
import msgspec

from services.cli.declaring import author
from services.cli.session import Session, common_options
from shared.errors import InvalidInputError
from shared.models.drill import Production
from shared.models.event import Event
from shared.models.host import Hold
from shared.registry import Registry


@click.command("production")
@click.argument("state", metavar="[on|off]", type=click.Choice(["on", "off"]), required=False)
@click.option("--note", default="", metavar="TEXT", help="Why, for whoever is asked.")
@common_options
def production_command(session: Session, *, state: str | None, note: str) -> int:
    """Show, set or remove the mark of a production fleet.

    With it, `redmesh drill run` refuses to begin without --yes.
    """

    async def act(registry: Registry) -> int:
        if state is not None:
            at_ms = await registry.replicas.server_time_ms()
            mark = Production(since_ms=at_ms, by=author(), note=note) if state == "on" else None
            await registry.drills.mark_production(mark)
            what = "marked as production" if mark else "not marked as production any more"
            await registry.fleet.emit(
                Event(
                    kind="FleetMarked",
                    subject="fleet/production",
                    message=f"{what} by {author()}",
                    source="cli",
                )
            )
        mark = await registry.drills.production()
        click.echo("this fleet is not marked as production" if mark is None else told(mark))
        return 0

    return session.run(act)


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What operators wish that nobody in the fleet remembers when Redis has lost its data."""

    mark: Production | None
    holds: dict[str, Hold]


async def read_wishes(registry: Registry) -> Wishes:
    """Read the mark of production, cordons and drains."""
    return Wishes(mark=await registry.drills.production(), holds=dict(await registry.fleet.holds()))


async def give_back(registry: Registry, wishes: Wishes) -> None:
    """Write again what is missing; what was set meanwhile stays."""
    there = await read_wishes(registry)
    if wishes.mark is not None and there.mark is None:
        await registry.drills.mark_production(wishes.mark)
    for subject, hold in wishes.holds.items():
        if subject not in there.holds:
            await registry.fleet.put_hold(hold)


def told(mark: Production) -> str:
    """Say who marked the fleet and why."""
    return f"this fleet is marked as production by {mark.by}" + (
        f": {mark.note}" if mark.note else ""
    )


async def check(registry: Registry, *, yes: bool) -> None:
    """Raise `InvalidInputError` on a production fleet unless the operator said yes."""
    mark = await registry.drills.production()
    if mark is not None and not yes:
        raise InvalidInputError(
            f"{told(mark)}. A drill breaks something on purpose: say --yes if that is wanted",
            field="--yes",
        )
