"""Settings: every program's configuration, read once from the environment, all errors at once.

A settings class is a frozen msgspec struct. Field `redis_url` is read from `REDMESH_REDIS_URL`;
a `Secret` field may come from a file instead, named by `REDMESH_REDIS_URL_FILE`. Values given by
command-line flags win over the environment. Nothing is read at import.
"""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, get_type_hints

import msgspec

from shared.errors import InvalidInputError
from shared.ids import is_name, slug
from shared.secret import Secret

PREFIX: Final = "REDMESH_"

T = TypeVar("T", bound=msgspec.Struct)


class CommonSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What every service needs."""

    redis_url: Secret = msgspec.field(default_factory=lambda: Secret("redis://127.0.0.1:6379/0"))
    """URL of scheme redis, redis+sentinel or redis+cluster (rediss… with TLS); may hold a password.
    """
    redis_password_file: str = ""
    """File with the password of Redis instead; read for each new connection, so it may change."""
    key_prefix: str = "redmesh"
    """First part of every Redis key and channel."""
    fleet_secret: Secret = msgspec.field(default_factory=lambda: Secret(""))
    """Shared by agents and proxies; engine API keys are derived from it."""
    host_name: str = msgspec.field(default_factory=lambda: slug(socket.gethostname()))
    """Name of this host in the fleet."""
    log_level: str = "info"
    """`debug`, `info`, `warning` or `error`."""
    log_format: str = "auto"
    """`json`, `console`, or `auto`: console on a terminal, else json."""


def variable(field: str) -> str:
    """Name the environment variable of a settings field."""
    return PREFIX + field.upper()


def load(
    kind: type[T],
    environ: Mapping[str, str],
    overrides: Mapping[str, object] | None = None,
) -> T:
    """Build settings of `kind`; raise one `InvalidInputError` that lists every problem.

    `overrides` are values of command-line flags by field name; `None` means not given.
    """
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    values: dict[str, Any] = {}
    problems: list[str] = []
    hints = get_type_hints(kind)
    for field in msgspec.structs.fields(kind):
        if field.name in given:
            raw: object = given[field.name]
            origin = f"--{field.name.replace('_', '-')}"
        else:
            origin = variable(field.name)
            try:
                found = _from_environment(environ, origin, secret=hints[field.name] is Secret)
            except InvalidInputError as error:
                problems.append(str(error))
                continue
            if found is None:
                continue
            raw = found
        if hints[field.name] is Secret:
            values[field.name] = raw if isinstance(raw, Secret) else Secret(str(raw))
            continue
        try:
            values[field.name] = msgspec.convert(raw, type=hints[field.name], strict=False)
        except msgspec.ValidationError as error:
            problems.append(f"{origin}={raw!r}: {str(error)[0].lower()}{str(error)[1:]}")
    if not problems:
        settings = kind(**values)
        problems = _check_common(settings)
        if not problems:
            return settings
    raise InvalidInputError("\n".join(problems))


def _from_environment(environ: Mapping[str, str], name: str, *, secret: bool) -> str | None:
    value = environ.get(name)
    path = environ.get(f"{name}_FILE") if secret else None
    if path is None:
        return value
    if value is not None:
        raise InvalidInputError(f"{name} and {name}_FILE are both set: unset one")
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InvalidInputError(
            f"{name}_FILE={path!r}: cannot be read: {error.strerror}"
        ) from error


def _check_common(settings: msgspec.Struct) -> list[str]:
    if not isinstance(settings, CommonSettings):
        return []
    problems: list[str] = []
    for field in ("key_prefix", "host_name"):
        value: str = getattr(settings, field)
        if not is_name(value):
            problems.append(
                f"{variable(field)}={value!r}: use letters, digits and . _ : / @ + - only"
            )
    allowed = {
        "log_level": ("debug", "info", "warning", "error"),
        "log_format": ("auto", "json", "console"),
    }
    for field, choices in allowed.items():
        value = getattr(settings, field)
        if value not in choices:
            problems.append(f"{variable(field)}={value!r}: use one of {', '.join(choices)}")
    return problems
