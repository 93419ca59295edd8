"""`redmesh logs`: the log of a replica or of a service, from the state directory."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from services.cli.session import Session, common_options
from services.cli.statedir import StateDir
from shared.errors import NotFoundError
from shared.ids import is_name

_BLOCK_BYTES: Final = 64 << 10
_POLL_S: Final = 0.2


@click.command("logs")
@click.argument("what", metavar="REPLICA|SERVICE")
@click.option("-f", "--follow", is_flag=True, help="Go on as lines are added, until Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(0, 1_000_000), default=100, show_default=True)
@common_options
def logs_command(session: Session, what: str, *, follow: bool, lines: int) -> int:
    """Show the log of a replica's engine, or of a service of this machine's mesh.

    Services are redis, controller-0, agent-local-1, proxy-0, supervisor, and so on. On a host of
    its own an agent keeps its engines' logs in its state directory: name that with --state-dir.
    """
    path = find(session.state, what)
    click.echo(last_lines(path, lines))
    if follow:
        for text in _follow(path):
            click.echo(text, nl=False)
    return 0


def find(state: StateDir, what: str) -> Path:
    """Find the log of a replica or service; raise `NotFoundError` that lists those there are."""
    engines = {
        path.parent.name: path
        for root in (state.path, *state.path.glob("agent-*"))
        for path in sorted(root.glob("engines/*/engine.log"))
    }
    services = {path.stem: path for path in sorted(state.logs.glob("*.log"))}
    name = what.removeprefix("replica/")
    if is_name(name) and (name in engines or name in services):
        return engines.get(name) or services[name]
    known = ", ".join([*services, *engines]) or "none"
    raise NotFoundError(
        f"there is no log of {what!r} in {state.path}; there are: {known}. Logs of another "
        "machine's replica are on that machine: `redmesh get replicas` names the host; there run "
        f"`redmesh logs {what} --state-dir DIR` with DIR the agent's state directory"
    )


def last_lines(path: Path, count: int) -> str:
    """Read the last `count` lines of a file without reading all of it; "" if there is none."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            content = b""
            while end > 0 and content.count(b"\n") <= count:
                start = max(0, end - _BLOCK_BYTES)
                file.seek(start)
                content = file.read(end - start) + content
                end = start
    except OSError:
        return ""
    lines = content.decode(errors="replace").splitlines()
    return "\n".join(lines[-count:] if count else [])


def _follow(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        while True:
            content = file.read(_BLOCK_BYTES)
            if content:
                yield content.decode(errors="replace")
            else:
                time.sleep(_POLL_S)
