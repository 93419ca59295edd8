"""How a command finds the mesh, and how its errors reach a person.

The Redis of a mesh is named by the first of: `--redis-url`, `--state-dir`, REDMESH_REDIS_URL (or
REDMESH_REDIS_URL_FILE), `./.redmesh`. A flag wins over the environment, as everywhere. Each error
that redmesh raises on purpose becomes one message on stderr; `--debug` shows where it came from.
"""

import asyncio
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from services.cli.launch import exit_code
from services.cli.statedir import DEFAULT, StateDir
from shared import errors, settings
from shared.errors import NotFoundError, RegistryUnavailableError
from shared.registry import Registry, open_registry
from shared.secret import Secret
from shared.settings import CommonSettings

CONNECT_DEADLINE_S: Final = 3.0

F = TypeVar("F", bound=Callable[..., Any])


class Session:
    """What the common options say."""

    def __init__(self) -> None:
        self.redis_url: str | None = None
        self.state_dir: Path | None = None
        self.debug = False

    @property
    def state(self) -> StateDir:
        """The state directory, named or default, whether it exists or not."""
        return StateDir(self.state_dir or DEFAULT)

    def settings(self) -> CommonSettings:
        """Find the Redis of the mesh; raise `NotFoundError` when nothing names one."""
        overrides: dict[str, object] = {}
        environ = dict(os.environ)
        named = any(name in environ for name in ("REDMESH_REDIS_URL", "REDMESH_REDIS_URL_FILE"))
        if self.redis_url is not None:
            overrides["redis_url"] = Secret(self.redis_url)
        elif self.state_dir is not None or not named:
            found = self.state.read_redis_url()
            if found is None:
                raise NotFoundError(
                    f"no mesh runs from {self.state.path}: start one with `redmesh up`, or name "
                    "the Redis of yours with --redis-url, --state-dir or REDMESH_REDIS_URL"
                )
            overrides["redis_url"] = Secret(found)
        return settings.load(CommonSettings, environ, overrides)

    def run(self, act: Callable[[Registry], Awaitable[int]]) -> int:
        """Connect, do `act`, and return its exit code."""

        async def connected() -> int:
            registry = await open_quickly(self.settings())
            try:
                return await act(registry)
            finally:
                await registry.aclose()

        return asyncio.run(connected())


async def open_quickly(common: CommonSettings) -> Registry:
    """Open the registry, or give up within `CONNECT_DEADLINE_S`: a person is waiting."""
    try:
        async with asyncio.timeout(CONNECT_DEADLINE_S):
            return await open_registry(common)
    except TimeoutError:
        raise RegistryUnavailableError(
            f"Redis did not answer within {CONNECT_DEADLINE_S:g} s: check that it runs and that "
            "its address (--redis-url, REDMESH_REDIS_URL, --state-dir) is right"
        ) from None


def common_options(command: F) -> F:
    """Add the options that every command of an operator has."""
    for option in reversed(
        (
            click.option(
                "--redis-url",
                metavar="URL",
                expose_value=False,
                callback=_remember,
                help="Redis of the mesh. With a password, prefer REDMESH_REDIS_URL[_FILE]: "
                "command lines are visible to everybody on the machine.",
            ),
            click.option(
                "--state-dir",
                metavar="DIR",
                type=click.Path(file_okay=False, path_type=Path),
                expose_value=False,
                callback=_remember,
                help="State directory of a mesh started with `redmesh up` [default: .redmesh].",
            ),
            click.option(
                "--debug",
                is_flag=True,
                expose_value=False,
                callback=_remember,
                help="Show where an error came from.",
            ),
        )
    ):
        command = option(command)
    return click.pass_obj(command)  # pyright: ignore[reportReturnType] - click's decorator hides the signature


def _remember(context: click.Context, option: click.Parameter, value: object) -> None:
    if value not in (None, False):
        setattr(context.find_object(Session), option.name, value)


def guarded(session: Session, act: Callable[[], int]) -> int:
    """Run `act`; turn errors into a message and an exit code."""
    try:
        return act()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except errors.RedmeshError as error:
        if session.debug:
            traceback.print_exc()
        print(f"redmesh: {error}", file=sys.stderr)
        return exit_code(error)
    except BrokenPipeError:
        # The reader of a pipe has seen enough. Keep the interpreter from flushing into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if session.debug:
            traceback.print_exc()
        name = f" {error.filename}" if error.filename else ""
        print(f"redmesh:{name}: {error.strerror or error}", file=sys.stderr)
    return 1
