"""The door to Redis: one connection pool, its errors in our own words, and EVALSHA.

Callers see `RegistryUnavailableError` (now), `RegistryTimeoutError` (the act may have happened) and
`RegistryRefusedError` (for good), never an error of the client library. A primary that became a
replica answers READONLY for as long as a socket to it stays open; so READONLY drops the pool, and
the next call resolves the address again. Texts name the URL without its password.

How the client library is set up for each topology stands in `clients`.
"""

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol, TypeVar, cast

import redis.asyncio.client
import redis.exceptions
from redis.asyncio.cluster import RedisCluster

from shared.errors import (
    CorruptRecordError,
    RedmeshError,
    RegistryRefusedError,
    RegistryTimeoutError,
    RegistryUnavailableError,
    SchemaVersionError,
)
from shared.registry.addresses import shown_url
from shared.registry.clients import Client, make_client
from shared.registry.keys import Keys
from shared.registry.loader import ScriptLibrary, ScriptSpec
from shared.settings import CommonSettings

START_ATTEMPTS: Final = 8
SCHEMA_VERSION: Final = 1
SUPPORTED_SCHEMAS: Final = (1, 1)

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
)
"""All that the client library raises."""

Argument = str | bytes | int

T = TypeVar("T")


class Evaluator(Protocol):
    """All that the ledger asks of a client: run one script. A leaner client fits here."""

    async def evalsha(
        self, script: ScriptSpec, keys: Sequence[str | bytes], args: Sequence[Argument]
    ) -> Any:  # noqa: ANN401 - a reply is whatever the script returns
        """Run `script`; raise the errors of `shared.errors` only."""
        ...


class _Client(Protocol):
    """What both clients of the library offer, with types."""

    async def execute_command(self, *parts: Argument) -> Any:  # noqa: ANN401 - any reply
        ...

    async def aclose(self) -> None: ...

    def pubsub(self) -> redis.asyncio.client.PubSub: ...


class Connection:
    """A pool of connections to one Redis, to the primary that Sentinels name, or to a cluster."""

    def __init__(
        self,
        client: Client,
        scripts: ScriptLibrary,
        *,
        shown_url: str = "redis",
    ) -> None:
        self._client = cast("_Client", client)
        self._pool = None if isinstance(client, RedisCluster) else client.connection_pool
        self._scripts = scripts
        self.shown_url = shown_url
        """Where this goes, without user and password."""

    async def evalsha(
        self, script: ScriptSpec, keys: Sequence[str | bytes], args: Sequence[Argument]
    ) -> Any:  # noqa: ANN401 - a reply is whatever the script returns
        """Run `script`, loading it if this server does not know it yet."""
        assembled = self._scripts[script.name]
        try:
            try:
                return await self._client.execute_command(
                    "EVALSHA", assembled.sha, len(keys), *keys, *args
                )
            except redis.exceptions.NoScriptError:
                # A restart, failover or SCRIPT FLUSH forgot it. EVAL also loads it, on the right
                # node of a cluster.
                return await self._client.execute_command(
                    "EVAL", assembled.text, len(keys), *keys, *args
                )
        except TROUBLES as error:
            raise await self._mapped(error, script=script, key=_text(keys[0])) from error

    async def command(self, *parts: Argument) -> Any:  # noqa: ANN401 - a reply is what Redis says
        """Run one plain command."""
        try:
            return await self._client.execute_command(*parts)
        except TROUBLES as error:
            key = _text(parts[1]) if len(parts) > 1 else ""
            raise await self._mapped(error, key=key) from error

    async def ping(self) -> None:
        """Raise unless Redis answers."""
        await self.command("PING")

    async def aclose(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    def subscriber(self) -> redis.asyncio.client.PubSub:
        """Open a subscription; on a cluster to any node, since PUBLISH reaches them all."""
        return self._client.pubsub()

    async def mapped(self, error: Exception) -> RedmeshError:
        """Say in our own words what an error of the client library means."""
        return await self._mapped(error)

    async def _mapped(
        self, error: Exception, *, script: ScriptSpec | None = None, key: str = ""
    ) -> RedmeshError:
        text = " ".join(str(error).split())[:300]
        where = f"Redis at {self.shown_url}"
        if isinstance(error, (redis.exceptions.TimeoutError, TimeoutError)):
            return RegistryTimeoutError(f"{where} did not answer in time")
        if isinstance(error, _FORBIDDEN_KINDS) or _has(text, _FORBIDDEN):
            return RegistryRefusedError(
                f"{where} refused us ({_reason(text)}): give user and password in "
                "REDMESH_REDIS_URL, as redis://USER:PASSWORD@HOST:PORT/0, or the password in the "
                "file that REDMESH_REDIS_PASSWORD_FILE names, and let that user use the keys and "
                "channels of our prefix"
            )
        if isinstance(error, redis.exceptions.ReadOnlyError) or _has(text, _DEMOTED):
            await self._drop_pool()
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

    async def _drop_pool(self) -> None:
        if self._pool is None:
            await self._client.aclose()  # the next command reads the cluster's topology again
        else:
            await self._pool.disconnect(inuse_connections=False)


async def connect(settings: CommonSettings, *, hot: bool = False, prove: bool = True) -> Connection:
    """Load the scripts, connect, and prove it with a PING (unless `prove` is false).

    Raises InvalidInputError for a URL that is none, RegistryUnavailableError or
    RegistryRefusedError with the remedy when Redis is away or refuses us.
    """
    url = settings.redis_url.reveal()
    shown = shown_url(url)
    client = make_client(url, hot=hot, password_file=settings.redis_password_file)
    scripts = await asyncio.to_thread(ScriptLibrary.load)
    connection = Connection(client, scripts, shown_url=shown)
    if not prove:
        return connection
    try:
        await patiently(connection.ping)
    except RegistryUnavailableError as error:
        await connection.aclose()
        raise RegistryUnavailableError(
            f"cannot use Redis at {shown}: {_reason(str(error.__cause__ or error))}. Start it, or "
            "name the right one with --redis-url or REDMESH_REDIS_URL"
        ) from error
    except BaseException:
        await connection.aclose()
        raise
    return connection


async def check_schema(connection: Connection, keys: Keys) -> int:
    """Return the schema version of the data, writing ours if there is none.

    Raises SchemaVersionError when this release cannot work with it.
    """
    await connection.command("SET", keys.fleet.schema, SCHEMA_VERSION, "NX")
    found = _text(await connection.command("GET", keys.fleet.schema))
    lowest, highest = SUPPORTED_SCHEMAS
    if found.isdigit() and lowest <= int(found) <= highest:
        return int(found)
    raise SchemaVersionError(
        f"the data in Redis at {connection.shown_url} has schema version {found[:40]!r} (key "
        f"{keys.fleet.schema}), and this release works with {lowest} to {highest}: use the release "
        "that wrote it, another Redis database, or another REDMESH_KEY_PREFIX"
    )


async def patiently(act: Callable[[], Awaitable[T]]) -> T:
    """Do something at start, where a busy machine deserves more time than the hot path gives."""
    for _ in range(START_ATTEMPTS - 1):
        with contextlib.suppress(RegistryTimeoutError):
            return await act()
    return await act()


def _has(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)


def _reason(text: str) -> str:
    return text.strip().rstrip(".") or "no reason given"


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
