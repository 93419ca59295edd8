"""`redmesh get`: list what is in the registry."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import click
import msgspec
from rich.console import Console
from rich.live import Live

from services.cli import listings
from services.cli.session import Session, common_options
from services.cli.tables import console, render
from shared.errors import InvalidInputError, RegistryUnavailableError
from shared.registry import Registry

WATCH_INTERVAL_S: Final = 1.0


def kind_of(word: str) -> str:
    """Find the kind that `word` means, in singular or plural."""
    for kind in listings.KINDS:
        if word in (kind, kind.removesuffix("s"), kind.replace("ies", "y")):
            return kind
    raise InvalidInputError(
        f"there is nothing called {word!r} to get; there are: {', '.join(listings.KINDS)}",
        field="KIND",
    )


@click.command("get")
@click.argument("kind", metavar="KIND")
@click.option("-m", "--model", metavar="MODEL", help="Only what belongs to this model.")
@click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True
)
@click.option("-w", "--watch", is_flag=True, help="Show it again each second, until Ctrl-C.")
@common_options
def get_command(session: Session, *, kind: str, model: str | None, output: str, watch: bool) -> int:
    """List KIND: deployments, replicas, hosts, proxies, controllers, reservations or events."""
    read = listings.KINDS[kind_of(kind)]
    screen = console()

    async def show(registry: Registry, live: Live | None) -> None:
        listing = await read(registry, model)
        if output == "json":
            click.echo(msgspec.json.format(msgspec.json.encode(listing.records), indent=2))
        elif live is not None:
            live.update(render(listing), refresh=True)
        else:
            screen.print(render(listing))

    async def act(registry: Registry) -> int:
        if not watch:
            await show(registry, None)
            return 0
        if output == "json" or not screen.is_terminal:
            while True:
                await _again(lambda: show(registry, None), screen)
        with Live(console=screen, auto_refresh=False, vertical_overflow="visible") as live:
            while True:
                await _again(lambda: show(registry, live), screen)

    return session.run(act)


async def _again(show: Callable[[], Awaitable[None]], screen: Console) -> None:
    """Show once more and wait; a Redis that is away is said, and waited for."""
    try:
        await show()
    except RegistryUnavailableError as error:
        screen.print(str(error), markup=False)
    await asyncio.sleep(WATCH_INTERVAL_S)
