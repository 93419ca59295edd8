"""`redmesh apply`: declare the models of a file."""

from pathlib import Path

import click

from services.cli import modelsfile
from services.cli.declaring import Change, author, changed, check_names, declare
from services.cli.session import Session, common_options
from shared.registry import Registry


@click.command("apply")
@click.option(
    "-f",
    "--file",
    "path",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Models file (JSON).",
)
@click.option("--dry-run", is_flag=True, help="Check, and say what would change; change nothing.")
@common_options
def apply_command(session: Session, path: Path, *, dry_run: bool) -> int:
    """Declare the models of FILE. Nothing is applied unless all of it is valid.

    Models that the file does not name stay as they are: `redmesh delete` removes one.
    """
    specs = modelsfile.read(path)

    async def act(registry: Registry) -> int:
        await check_names(registry, specs)
        current = await registry.fleet.deployments()
        for spec in specs:
            if dry_run:
                done, _ = changed(current.get(spec.name), spec, at_ms=0, by=author())
                suffix = " (dry run)"
            else:
                done, suffix = await declare(registry, spec), ""
            count = f", {spec.replicas.count} replicas" if done is Change.CREATED else ""
            click.echo(f"deployment/{spec.name} {done}{count}{suffix}")
        return 0

    return session.run(act)
