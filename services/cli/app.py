"""The operator's commands as one click application; each module is loaded when it is asked for."""

import importlib
import sys
from collections.abc import Sequence
from types import MappingProxyType
from typing import Final, cast

import click

from services.cli import launch
from services.cli.session import Session, guarded

COMMANDS: Final = MappingProxyType(
    {
        "up": ("up", "start a whole mesh on this machine and serve the models of a file"),
        "down": ("down", "stop a mesh that `up` started"),
        "apply": ("apply", "declare the models of a file"),
        "get": ("get", "list deployments, replicas, hosts, proxies, …"),
        "describe": ("describe", "show one thing and its recent events"),
        "scale": ("steer", "set how many replicas a model has"),
        "delete": ("steer", "drain a model and forget it"),
        "cordon": ("steer", "place no new replicas on a host"),
        "uncordon": ("steer", "take back cordon or drain"),
        "drain": ("steer", "move everything off a host, or a replica out of service"),
        "logs": ("logs", "show the log of a replica or a service"),
        "audit": ("auditing", "compare the ledger with the proxies and the engines"),
        "drill": ("drill.command", "rehearse a failure, and judge what the mesh makes of it"),
        "production": ("drill.production", "mark a fleet that real users depend on"),
        "doctor": ("doctor", "find what is wrong here, and say what to do"),
        "redis": ("rediscommand", "run one Redis command on the mesh's Redis"),
        "supervise": ("supervise", ""),
        "links": ("links", ""),
    }
)
"""Command → its module, and what `redmesh --help` says of it. Without a text it is hidden."""

OPERATING: Final = tuple(name for name, (_, text) in COMMANDS.items() if text)


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return [*OPERATING, *launch.SERVICES]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name in launch.SERVICES:
            return click.Command(cmd_name, help=launch.SERVICES[cmd_name])
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"services.cli.{COMMANDS[cmd_name][0]}")
        return cast("click.Command", getattr(module, f"{cmd_name}_command"))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in OPERATING])
        with formatter.section("Services (what containers run)"):
            formatter.write_dl(list(launch.SERVICES.items()))


@click.group(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="redmesh")
@click.option("--debug", is_flag=True, help="Show where an error came from.")
@click.pass_obj
def application(session: Session, debug: bool) -> None:  # noqa: FBT001 - click calls it by name
    """Serve large language models so that any process can die and no answer is lost."""
    session.debug = session.debug or debug


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    session = Session()

    def act() -> int:
        code = application.main(
            args=list(arguments), prog_name="redmesh", obj=session, standalone_mode=False
        )
        return code if isinstance(code, int) else 0

    code = guarded(session, act)
    sys.stdout.flush()
    return code
