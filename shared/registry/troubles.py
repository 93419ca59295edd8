"""What the troubles of Redis and of its client library mean, in the words of `shared.errors`.

`RegistryUnavailableError` is for now, `RegistryTimeoutError` says that the act may have happened,
and `RegistryRefusedError` is for good. Texts name the URL without its password.
"""

import re
from typing import Final

import redis.exceptions

from shared.errors import (
    CorruptRecordError,
    RegistryError,
    RegistryRefusedError,
    RegistryTimeoutError,
    RegistryUnavailableError,
)
from shared.registry.loader import ScriptLibrary, ScriptSpec

_SCRIPT_LINE: Final = re.compile(r"user_script:(\d+)")
# The client library turns some of Redis' error codes into classes and leaves others in the text;
# within a script's error they are always in the text.
_UNAVAILABLE_KINDS: Final = (
    redis.exceptions.ConnectionError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.MasterDownError,
    redis.exceptions.TryAgainError,
    redis.exceptions.AskError,
    redis.exceptions.MovedError,
)
_UNAVAILABLE: Final = (
    "OOM",
    "MISCONF",
    "LOADING",
    "CLUSTERDOWN",
    "MASTERDOWN",
    "NOREPLICAS",
    "BUSY ",
)
_FORBIDDEN_KINDS: Final = (
    redis.exceptions.AuthenticationError,
    redis.exceptions.AuthenticationWrongNumberOfArgsError,
    redis.exceptions.NoPermissionError,
)
_FORBIDDEN: Final = (
    "NOAUTH",
    "WRONGPASS",
    "NOPERM",
    "invalid username-password",
    "Client sent AUTH",
)
_DEMOTED: Final = ("READONLY", "previous master is now a slave")

TROUBLES: Final = (
    redis.exceptions.RedisError,
    redis.exceptions.RedisClusterException,
    OSError,
    TimeoutError,
    RuntimeError,
    AttributeError,
)
"""All that the client library raises. A `RuntimeError` is uvloop's word for a write to a transport
that has just been closed; the library passes it on when Redis dies while it subscribes again. Its
own is an `AttributeError`, where a connection is closed under a command: it writes to no writer."""


class Troubles:
    """The troubles with one Redis."""

    def __init__(self, shown_url: str, scripts: ScriptLibrary) -> None:
        self._where = f"Redis at {shown_url}"
        self._scripts = scripts

    def of(
        self, error: Exception, *, script: ScriptSpec | None = None, key: str = ""
    ) -> RegistryError:
        """Say what `error` means, of `script` or near `key`."""
        text = " ".join(str(error).split())[:300]
        where = self._where
        if isinstance(error, (redis.exceptions.TimeoutError, TimeoutError)):
            return RegistryTimeoutError(f"{where} did not answer in time")
        if isinstance(error, _FORBIDDEN_KINDS) or _has(text, _FORBIDDEN):
            return RegistryRefusedError(
                f"{where} refused us ({reason_of(text)}): give user and password in "
                "REDMESH_REDIS_URL, as redis://USER:PASSWORD@HOST:PORT/0, or the password in the "
                "file that REDMESH_REDIS_PASSWORD_FILE names, and let that user use the keys and "
                "channels of our prefix"
            )
        if demoted(error):
            return RegistryUnavailableError(f"{where} is a replica now: looking for the primary")
        if "WRONGTYPE" in text:
            return CorruptRecordError(
                f"{where} holds foreign data in one of our keys, near {key}: rename or delete it",
                key=key,
            )
        if (
            isinstance(error, redis.exceptions.ResponseError)
            and not isinstance(error, _UNAVAILABLE_KINDS)
            and not _has(text, _UNAVAILABLE)
        ):
            return RegistryRefusedError(f"{where} refused: {self._located(text, script)}")
        return RegistryUnavailableError(f"{where} is not available: {text or type(error).__name__}")

    def _located(self, text: str, script: ScriptSpec | None) -> str:
        if script is None:
            return text
        assembled = self._scripts[script.name]
        return _SCRIPT_LINE.sub(lambda found: assembled.origin(int(found[1])), text)


def demoted(error: Exception) -> bool:
    """Tell whether an error says that this server is no primary any more."""
    return isinstance(error, redis.exceptions.ReadOnlyError) or _has(str(error), _DEMOTED)


def reason_of(text: str) -> str:
    """Give the text of an error as part of a sentence."""
    return text.strip().rstrip(".") or "no reason given"


def _has(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)
