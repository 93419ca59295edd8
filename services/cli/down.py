"""`redmesh down`: stop a mesh that `up` started."""

import click

from services.cli import stopping
from services.cli.session import Session, common_options


@click.command("down")
@click.option("--now", is_flag=True, help="Do not wait for requests in flight.")
@common_options
def down_command(session: Session, *, now: bool) -> int:
    """Drain and stop everything that `redmesh up` started from this state directory.

    Works as well when its supervisor is gone. Stopping what does not run is no error.
    """
    state = session.state
    mesh = state.read_mesh()
    if mesh is None:
        click.echo(f"no mesh runs from {state.path}")
        return 0
    click.echo(f"stopping the mesh of {state.path} …", err=True)
    orderly = stopping.stop(state, mesh, timeout_s=1.0 if now else None)
    click.echo("stopped" if orderly else "stopped; its supervisor had gone before")
    return 0
