"""The hidden command `redmesh supervise`: the process that owns the children of one mesh.

`up` writes the plan into `mesh.json` and starts this process in a session of its own, so that
Ctrl-C in the terminal reaches only `up`, which then asks it to stop. SIGTERM or SIGINT: drain and
stop; a second one: hurry. With `--foreground PID` it also stops when `up` itself has died.
"""

import asyncio
import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec

from services.cli import processes
from services.cli.statedir import Mesh, StateDir
from services.cli.supervisor import Supervisor
from shared import logs
from shared.errors import NotFoundError

_PARENT_POLL_S = 0.5


@click.command("supervise", hidden=True)
@click.option("--state-dir", type=click.Path(path_type=Path), required=True)
@click.option("--foreground", "parent", type=int, default=0, help="Pid of the `up` to follow.")
def supervise_command(state_dir: Path, parent: int) -> int:
    """Keep the processes of one mesh running until told to stop."""
    logs.configure(style="json", service="supervisor")
    state = StateDir(state_dir)
    mesh = state.read_mesh()
    if mesh is None:
        raise NotFoundError(f"there is no plan in {state.mesh_file}: use `redmesh up`")
    asyncio.run(_supervise(state, mesh, parent))
    return 0


async def _supervise(state: StateDir, mesh: Mesh, parent: int) -> None:
    myself = processes.reference(os.getpid())

    def record(pids: dict[str, int]) -> None:
        running = {name: ref for name, pid in pids.items() if (ref := processes.reference(pid))}
        state.write_mesh(msgspec.structs.replace(mesh, supervisor=myself, running=running))

    record({})
    supervisor = Supervisor(mesh.children, record)
    with _requests() as (stop, hurry):
        watching = asyncio.ensure_future(_watch(parent, stop)) if parent else None
        try:
            await supervisor.run(stop, hurry)
        finally:
            if watching is not None:
                watching.cancel()
    await asyncio.to_thread(processes.sweep, mesh.id, grace_s=5.0)
    state.clear_run_files()


async def _watch(parent: int, stop: asyncio.Event) -> None:
    """Set `stop` once `up` is no longer our parent: it was killed, and nobody else would stop us.

    Polled, because a parent's death sends no signal on every system.
    """
    while os.getppid() == parent:  # noqa: ASYNC110 - no event tells of the parent's death
        await asyncio.sleep(_PARENT_POLL_S)
    stop.set()


@contextmanager
def _requests() -> Generator[tuple[asyncio.Event, asyncio.Event]]:
    """Yield two events: the first signal sets `stop`, a further one `hurry`."""
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def asked() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked)
    try:
        yield stop, hurry
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
