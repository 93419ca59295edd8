"""The hidden command `redmesh links`: the process of a mesh's links, started by `up --links`.

One link leads to Redis, and one to each port an engine may take: agents announce their engines on
loopback addresses from 127.0.0.2 on, where the links listen, and the engines themselves listen on
127.0.0.1. Nothing of the mesh knows that links exist.
"""

import asyncio
import contextlib
import time
from pathlib import Path

import click

from services.cli import linkwish
from services.cli.link import Link
from services.cli.statedir import StateDir
from shared import logs
from shared.errors import InvalidInputError
from shared.lifecycle import Loops, every, run_until_stopped, stop_signals

LOOPBACK = "127.0.0.1"


@click.command("links", hidden=True)
@click.option("--state-dir", type=click.Path(path_type=Path), required=True)
@click.option("--redis", "redis_ports", metavar="PORT:PORT", required=True, help="Listen, target.")
@click.option("--engines", multiple=True, metavar="ADDRESS:FIRST-LAST")
def links_command(state_dir: Path, redis_ports: str, engines: tuple[str, ...]) -> int:
    """Relay between the processes of one mesh until told to stop."""
    logs.configure(style="json", service="links")
    links = parse(redis_ports, engines)
    asyncio.run(Links(StateDir(state_dir), links).run())
    return 0


def parse(redis_ports: str, engines: tuple[str, ...]) -> list[Link]:
    """Make the links that the command line names, that to Redis first."""
    try:
        near, _, far = redis_ports.partition(":")
        links = [Link(LOOPBACK, int(near), (LOOPBACK, int(far)))]
        for text in engines:
            address, _, ports = text.rpartition(":")
            first, _, last = ports.partition("-")
            links += [
                Link(address, port, (LOOPBACK, port)) for port in range(int(first), int(last) + 1)
            ]
    except ValueError as error:
        raise InvalidInputError(f"links: {error}: write PORT:PORT and ADDRESS:FIRST-LAST") from None
    return links


class Links:
    """All links of a mesh, kept as the wish says."""

    def __init__(self, state: StateDir, links: list[Link]) -> None:
        self._state = state
        self._redis = links[0]
        self._home = links[0].target
        self._links = {link.name: link for link in links}
        self._seen = linkwish.LinkWish()
        self._cut: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Relay until a signal."""
        with stop_signals() as stop:
            async with Loops() as loops:
                self._redis.target = linkwish.read(self._state).redis or self._home
                for link in self._links.values():
                    loops.start(link.name, link.serve())
                loops.start("wishes", every(lambda: linkwish.POLL_S, self._look))
                await run_until_stopped(stop, loops)

    async def _look(self) -> None:
        wish = linkwish.read(self._state)
        over = time.time() >= wish.until_s
        cuts = {cut.link: cut for cut in wish.cuts if cut.link in self._links and not over}
        if wish.id == self._seen.id and frozenset(cuts) == self._cut:
            return
        for name in self._cut - frozenset(cuts):
            self._links[name].cut(None)
        for name, cut in cuts.items():
            self._links[name].cut(cut)
        self._cut = frozenset(cuts)
        self._redis.target = wish.redis or self._home
        self._seen = wish
        with contextlib.suppress(OSError):
            linkwish.replace(linkwish.seen_file(self._state), wish.id.encode())
