"""Starts a service by its name: the one place where the command line meets the services.

Services do not import each other, and the command line imports none of them: it finds their
entry point by name when asked, so that each can be installed, and can fail, without the others.
Flags are made from the fields of the service's settings class; all else comes from `REDMESH_*`.
Secrets have no flags: a command line is visible to everybody on the machine.
"""

import argparse
import ast
import asyncio
import importlib
import inspect
import itertools
import os
import sys
import textwrap
from collections.abc import Awaitable, Callable, Sequence
from types import MappingProxyType
from typing import Any, Final, cast, get_type_hints

import msgspec

from shared import errors, settings
from shared.secret import Secret

SERVICES: Final = MappingProxyType(
    {
        "proxy": "run a proxy: the HTTP API that clients call",
        "controller": "run a controller: leader or standby, keeps declared models running",
        "agent": "run the agent of this host: starts and watches engines",
        "simengine": "run a simulated engine (its own flags: see redmesh simengine --help)",
    }
)
"""Service → what `redmesh --help` says of it."""

Runner = Callable[[msgspec.Struct], "int | Awaitable[int]"]


def serve(service: str, arguments: Sequence[str]) -> int:
    """Run `service` until it ends and return its exit code; errors become one clear message."""
    try:
        if service == "simengine":
            module = importlib.import_module("services.simengine.main")
            return int(module.main(list(arguments)))
        return _run(service, arguments)
    except errors.RedmeshError as error:
        print(f"redmesh {service}: {error}", file=sys.stderr)
        return exit_code(error)
    except ModuleNotFoundError as error:
        print(
            f"redmesh {service}: the package {error.name!r} is missing: install redmesh[{service}]",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(f"redmesh {service}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def exit_code(error: errors.RedmeshError) -> int:
    """Tell the exit code of an error: 2 when the caller must mend the input, else 1."""
    return 2 if isinstance(error, errors.InvalidInputError) else 1


def _run(service: str, arguments: Sequence[str]) -> int:
    kind = settings_class(service)
    overrides = parse_flags(service, kind, arguments)
    loaded = settings.load(kind, os.environ, overrides)
    run = cast("Runner", importlib.import_module(f"services.{service}.main").run)
    result = run(loaded)
    if isinstance(result, int):
        return result
    return asyncio.run(_awaited(result))


async def _awaited(result: Awaitable[int]) -> int:
    return await result


def settings_class(service: str) -> type[msgspec.Struct]:
    """Find the settings class of `service`: `services.proxy.settings.ProxySettings`."""
    module = importlib.import_module(f"services.{service}.settings")
    return cast("type[msgspec.Struct]", getattr(module, f"{service.capitalize()}Settings"))


def parse_flags(
    service: str, kind: type[msgspec.Struct], arguments: Sequence[str]
) -> dict[str, str]:
    """Read `--field-name VALUE` for each field of `kind` that is not a secret.

    Values stay text: the settings loader checks them, all at once, with the environment's.
    """
    parser = argparse.ArgumentParser(
        prog=f"redmesh {service}",
        description=f"{SERVICES[service]}. Secrets come from REDMESH_REDIS_URL and "
        "REDMESH_FLEET_SECRET, or from files named by the same variables with _FILE.",
        allow_abbrev=False,
    )
    sentences = _sentences(kind)
    hints: dict[str, Any] = get_type_hints(kind)
    for field in msgspec.structs.fields(kind):
        if hints[field.name] is Secret:
            continue
        sentence = sentences.get(field.name, "")
        shown = "" if field.default in (msgspec.NODEFAULT, "") else f" [default: {field.default}]"
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            metavar="VALUE",
            default=None,
            help=f"{sentence}{shown} ({settings.variable(field.name)})".replace("%", "%%").strip(),
        )
    given = vars(parser.parse_args(list(arguments)))
    return {name: value for name, value in given.items() if value is not None}


def _sentences(kind: type[msgspec.Struct]) -> dict[str, str]:
    """Read the sentence under each field of a settings class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith(("services.", "shared.")):
            continue
        body = cast(
            "ast.ClassDef", ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        ).body
        for statement, following in itertools.pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                found[statement.target.id] = " ".join(str(following.value.value).split())
    return found
