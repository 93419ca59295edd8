"""The door to Redis: one client, its errors in our own words, and EVALSHA.

Callers see `RegistryUnavailableError` (now), `RegistryTimeoutError` (the act may have happened) and
`RegistryRefusedError` (for good), never an error of the client library. A primary that became a
replica answers READONLY for as long as a socket to it stays open; so READONLY drops what is open,
and the next call resolves the address again. Texts name the URL without its password.

How the client is set up for each topology stands in `clients`; what an error means in `troubles`.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol, TypeVar, cast

import redis.asyncio.client
import redis.exceptions
from redis.asyncio.cluster import RedisCluster

from shared.errors import (
    RegistryError,
    RegistryTimeoutError,
    RegistryUnavailableError,
    SchemaVersionError,
)
from shared.registry.addresses import shown_url
from shared.registry.clients import Client, make_client
from shared.registry.keys import Keys
from shared.registry.loader import ScriptLibrary, ScriptSpec
from shared.registry.troubles import TROUBLES, Troubles, demoted, reason_of
from shared.registry.wire import Argument, Head, OnReply, WireClient, head_of
from shared.settings import CommonSettings

START_ATTEMPTS: Final = 8
SCHEMA_VERSION: Final = 1
SUPPORTED_SCHEMAS: Final = (1, 1)

T = TypeVar("T")


class Evaluator(Protocol):
    """All that the ledger asks of a client: run one script."""

    async def evalsha(
        self, script: ScriptSpec, keys: Sequence[str | bytes], args: Sequence[Argument]
    ) -> Any:  # noqa: ANN401 - a reply is whatever the script returns
        """Run `script`; raise the errors of `shared.errors` only."""
        ...

    def call(
        self,
        script: ScriptSpec,
        keys: tuple[str, ...],
        args: Sequence[Argument],
        on_reply: OnReply,
    ) -> None:
        """Run `script`; hand its reply, or a RegistryError, to `on_reply`: once, and later."""
        ...


class _Client(Protocol):
    """What all clients offer, with types."""

    async def execute_command(self, *parts: Argument) -> Any:  # noqa: ANN401 - any reply
        ...

    async def aclose(self) -> None: ...

    def pubsub(self) -> redis.asyncio.client.PubSub: ...


class Connection:
    """The way to one Redis, to the primary that Sentinels name, or to a cluster."""

    def __init__(
        self,
        client: Client,
        scripts: ScriptLibrary,
        *,
        shown_url: str = "redis",
    ) -> None:
        self._client = cast("_Client", client)
        self._wire = client if isinstance(client, WireClient) else None
        self._pool = (
            None if isinstance(client, RedisCluster | WireClient) else client.connection_pool
        )
        self._scripts = scripts
        self._troubles = Troubles(shown_url, scripts)
        self._heads: dict[tuple[str, tuple[str, ...]], Head] = {}
        self._calls: set[asyncio.Task[Any]] = set()
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
            raise await self.mapped(error, script=script, key=_text(keys[0])) from error

    def call(
        self,
        script: ScriptSpec,
        keys: tuple[str, ...],
        args: Sequence[Argument],
        on_reply: OnReply,
    ) -> None:
        """Run `script`; hand its reply, or a RegistryError, to `on_reply`: once, and later.

        For the data plane, where a task for each call costs more than the call. Sentinels and
        clusters are left to the client library, and take a task.
        """
        if self._wire is None:
            task = asyncio.get_running_loop().create_task(self.evalsha(script, keys, args))
            self._calls.add(task)
            task.add_done_callback(partial(self._called, on_reply))
            return
        head = self._heads.get((script.name, keys))
        if head is None:
            head = head_of("EVALSHA", self._scripts[script.name].sha, len(keys), *keys)
            self._heads[script.name, keys] = head
        self._wire.submit(args, partial(self._replied, script, keys, args, on_reply), head)

    async def command(self, *parts: Argument) -> Any:  # noqa: ANN401 - a reply is what Redis says
        """Run one plain command."""
        try:
            return await self._client.execute_command(*parts)
        except TROUBLES as error:
            key = _text(parts[1]) if len(parts) > 1 else ""
            raise await self.mapped(error, key=key) from error

    async def ping(self) -> None:
        """Raise unless Redis answers."""
        await self.command("PING")

    async def aclose(self) -> None:
        """Close every connection."""
        calls = list(self._calls)
        for task in calls:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await self._client.aclose()

    def subscriber(self) -> redis.asyncio.client.PubSub:
        """Open a subscription; on a cluster to any node, since PUBLISH reaches them all."""
        return self._client.pubsub()

    async def mapped(
        self, error: Exception, *, script: ScriptSpec | None = None, key: str = ""
    ) -> RegistryError:
        """Say in our own words what an error of the client library means, and act on it."""
        if demoted(error):
            if self._wire is not None:
                self._wire.drop()
            elif self._pool is None:
                await self._client.aclose()  # the next command reads the cluster's topology again
            else:
                await self._pool.disconnect(inuse_connections=False)
        return self._troubles.of(error, script=script, key=key)

    def _called(self, on_reply: OnReply, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        if task.cancelled():
            closed = f"the connection to Redis at {self.shown_url} was closed by us"
            on_reply(RegistryUnavailableError(closed))
            return
        error = task.exception()
        if error is not None and not isinstance(error, RegistryError):
            # Whoever waits must hear of it: what the ledger hears nothing of is under way for ever.
            task.get_loop().call_exception_handler(
                {"message": "a call of Redis failed as none should", "exception": error}
            )
            error = RegistryUnavailableError(f"Redis at {self.shown_url} was not asked: {error!r}")
        on_reply(error or task.result())

    def _replied(
        self,
        script: ScriptSpec,
        keys: tuple[str, ...],
        args: Sequence[Argument],
        on_reply: OnReply,
        reply: Any,  # noqa: ANN401 - any reply
    ) -> None:
        if isinstance(reply, Exception):
            wire = cast("WireClient", self._wire)
            if isinstance(reply, redis.exceptions.NoScriptError) and args:
                text = ("EVAL", self._scripts[script.name].text, len(keys), *keys, *args)
                wire.submit(text, partial(self._replied, script, keys, (), on_reply))
                return
            if demoted(reply):
                wire.drop()
            reply = self._troubles.of(reply, script=script, key=keys[0])
        on_reply(reply)


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
        reason = reason_of(str(error.__cause__ or error))
        raise RegistryUnavailableError(
            f"cannot use Redis at {shown}: {reason}. Start it, or name the right one with "
            "--redis-url or REDMESH_REDIS_URL"
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


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
