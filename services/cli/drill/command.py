"""`redmesh drill list | run`: rehearse a failure, and judge what the mesh makes of it."""

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from services.cli.drill import options, page, production, told
from services.cli.drill.catalogue import DRILLS, Drill, Fault, budget_of, find
from services.cli.drill.choosing import Means, Via, choose
from services.cli.drill.rehearsal import Rehearsal
from services.cli.drill.report import Report
from services.cli.drill.scene import look
from services.cli.session import Session, common_options, open_quickly
from services.cli.showing import shower
from services.cli.tables import console, table
from shared.errors import InvalidInputError
from shared.registry import open_registry

HERE = Path("redmesh-drills")


@click.group("drill")
def drill_command() -> None:
    """Rehearse failures: each drill states what it does, what must be so, and what may be lost."""


@drill_command.command("list")
@click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True
)
def list_command(*, output: str) -> int:
    """List the drills there are."""
    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(list(DRILLS.values())), indent=2))
        return 0
    rows = [(drill.name, drill.what, drill.needs or "–") for drill in DRILLS.values()]
    console().print(table(("DRILL", "WHAT IT DOES", "NEEDS"), rows, wraps="WHAT IT DOES"))
    return 0


@drill_command.command("run")
@click.argument("name")
@click.option(
    "--target",
    multiple=True,
    metavar="KEY=VALUE",
    help="What to strike: model=, replica=, host= or proxy= (name or URL).",
)
@click.option(
    "--budget",
    "budget_text",
    default="",
    metavar="PARTS",
    help="Parts of the budget to change, such as failed=2,recover_s=10.",
)
@click.option(
    "--load",
    "load_text",
    default="",
    metavar="PARTS",
    help="users=8,tokens=64 (the default), or rate=5 streams a second; `live` drives nothing and "
    "watches the traffic there is.",
)
@click.option(
    "--via",
    type=click.Choice([each.value for each in Via]),
    default=Via.AUTO.value,
    show_default=True,
    help="How the fault is brought about.",
)
@click.option(
    "--hold", "hold_s", type=click.FloatRange(0.1, 600), help="Seconds that a lasting fault lasts."
)
@click.option("--yes", is_flag=True, help="Break something although this is production.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the reports [default: drills/ in the state directory, or redmesh-drills/].",
)
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text")
@click.option("--ecs-cluster", default="", metavar="NAME", help="ECS cluster of the fleet's tasks.")
@common_options
def run_command(
    session: Session,
    *,
    name: str,
    out: Path | None,
    output: str,
    yes: bool,
    **given: Any,  # noqa: ANN401 - `Given` says which and of what type
) -> int:
    """Rehearse the failure NAME on this mesh.

    Load is driven (or live traffic watched), the fault strikes, the mesh is watched until it is
    whole and exact again, and the budget decides. Exit code 0: passed. 1: the budget was missed.
    2: nothing was done, for the reason that is told.
    """
    wanted = _wanted(name, Given(**given))
    report = asyncio.run(_run(session, wanted, yes=yes))
    folder = _write(report, out or _folder(session, wanted.drill))
    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(report), indent=2))
    else:
        click.echo("\n".join(told.lines(report)))
        click.echo(f"\nReports: {folder}/report.html (open it in a browser), report.json, .txt")
    return 0 if report.verdict.passed else 1


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `drill run` as they were given."""

    target: tuple[str, ...]
    budget_text: str
    load_text: str
    via: str
    hold_s: float | None
    ecs_cluster: str


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What they mean."""

    drill: Drill
    load: options.LoadWish
    target: options.Target
    budget_text: str
    means: Means


def _wanted(name: str, given: Given) -> Wanted:
    """Understand all options, or refuse, before anything is asked of the mesh."""
    drill = find(name)
    if given.hold_s is not None:
        drill = msgspec.structs.replace(drill, hold_s=given.hold_s)
    options.budget(given.budget_text, drill.budget)
    return Wanted(
        drill=drill,
        load=options.load(given.load_text),
        target=options.target(given.target),
        budget_text=given.budget_text,
        means=Means(via=Via(given.via), hold_s=drill.hold_s, ecs_cluster=given.ecs_cluster),
    )


async def _run(session: Session, wanted: Wanted, *, yes: bool) -> Report:
    common = session.settings()
    async with contextlib.AsyncExitStack() as stack:
        calm = await open_quickly(common)
        stack.push_async_callback(calm.aclose)
        await production.check(calm, yes=yes)
        scene = await look(calm, session.state, wanted.target)
        budget = options.budget(
            wanted.budget_text, budget_of(wanted.drill, scene.facts(), len(scene.replicas))
        )
        injection = await choose(wanted.drill, scene, calm, wanted.means)
        fast = await open_registry(common, hot=True)
        stack.push_async_callback(fast.aclose)
        with shower() as show:
            rehearsal = Rehearsal(
                wanted.drill, scene, injection, budget, wanted.load, (calm, fast), show.say
            )
            wishes = await production.read_wishes(calm)
            report = await rehearsal.run()
            if wanted.drill.fault is Fault.REDIS_EMPTY:
                await production.give_back(calm, wishes)
            return report


def _folder(session: Session, drill: Drill) -> Path:
    base = session.state.path / "drills" if session.state.path.is_dir() else HERE
    return base / f"{time.strftime('%Y%m%d-%H%M%S')}-{drill.name}"


def _write(report: Report, folder: Path) -> Path:
    """Write the three forms of the report."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_bytes(
            msgspec.json.format(msgspec.json.encode(report), indent=2)
        )
        (folder / "report.txt").write_text("\n".join(told.lines(report)) + "\n", encoding="utf-8")
        (folder / "report.html").write_text(page.html(report), encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(
            f"--out {folder}: {error.strerror}: choose a folder that you may write", field="--out"
        ) from error
    return folder
