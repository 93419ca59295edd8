"""The clients of each topology, set up: pools, timeouts, retries, passwords.

The `hot` client is for the data plane: short timeouts and no hidden retries, because the caller has
its own deadline and its own fallback; for one server it is our own, of `wire`. A password that
stands in a file is read again for every new connection, so that it can be rotated while the
services run.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import redis.asyncio
import redis.asyncio.sentinel
import redis.exceptions
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.credentials import CredentialProvider

from shared.errors import InvalidInputError
from shared.registry.addresses import Address, Topology, parse
from shared.registry.troubles import TROUBLES
from shared.registry.wire import WireClient

HOT_TIMEOUT_S: Final = 0.25
HOT_CONNECT_TIMEOUT_S: Final = 0.5
"""A connection in the making holds up the beat that finds out that Redis is back."""
TIMEOUT_S: Final = 2.0
HOT_CONNECTIONS: Final = 8
CONNECTIONS: Final = 16
ASK_S: Final = 0.5
"""How often Sentinels are asked whether the primary is still the one we know."""
NODE_CONNECTIONS: Final = 256
"""To one node of a cluster. The library's cluster client refuses what exceeds its limit instead of
letting it wait, so the limit is one that our own limits on calls under way never reach."""

Client = redis.asyncio.Redis | RedisCluster | WireClient


def make_client(url: str, *, hot: bool, password_file: str = "") -> Client:
    """Set a client up for `url`; nothing is connected yet. Raises InvalidInputError."""
    address = parse(url)
    timeout_s = HOT_TIMEOUT_S if hot else TIMEOUT_S
    retry = Retry(NoBackoff(), 0) if hot else Retry(ExponentialWithJitterBackoff(0.5, 0.05), 2)
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": HOT_CONNECT_TIMEOUT_S if hot else TIMEOUT_S,
        "socket_keepalive": True,
        "decode_responses": False,
        "max_connections": HOT_CONNECTIONS if hot else CONNECTIONS,
        "retry": retry,
        # RESP3 turns on maintenance notifications, with which the client library hands out
        # connections that the server has closed: after a restart each would fail once.
        "protocol": 2,
        # Else the client library reads its own package metadata from disk for each connection.
        "driver_info": None,
    }
    try:
        options |= _from_url(address, password_file)
        if address.topology is Topology.CLUSTER:
            return _cluster(address, options)
        if address.topology is Topology.SENTINEL:
            return _sentinel(address, options, timeout_s)
        pools = cast("Any", redis.asyncio.BlockingConnectionPool)  # its options are not typed
        client = redis.asyncio.Redis.from_pool(pools(timeout=timeout_s, **options))
        return _lean(client, options) if hot else client
    except ValueError as error:
        raise InvalidInputError(
            f"redis_url is not valid: {error}: use redis://HOST:PORT/0", field="redis_url"
        ) from error


def _lean(client: redis.asyncio.Redis, options: Mapping[str, Any]) -> WireClient:
    """Give our own client, with the timeouts that the library's would have."""
    timeout_s = float(options["socket_timeout"])
    # Open, greeted by name and password, and the database selected.
    open_s = float(options["socket_connect_timeout"]) + 2 * timeout_s
    return WireClient(client, timeout_s=timeout_s, open_s=open_s)


def _from_url(address: Address, password_file: str) -> dict[str, Any]:
    """Read what the URL says: login, database, and the options in its query."""
    options = dict(cast("dict[str, Any]", parse_url(address.plain_url)))
    if password_file:
        user = cast("str | None", options.pop("username", None))
        options.pop("password", None)
        options["credential_provider"] = PasswordFile(Path(password_file), user)
    return options


def _cluster(address: Address, options: dict[str, Any]) -> RedisCluster:
    for name in ("host", "port", "db"):
        options.pop(name, None)
    if "connection_class" in options:  # rediss
        del options["connection_class"]
        options["ssl"] = True
    options["max_connections"] = NODE_CONNECTIONS
    clusters = cast("Any", RedisCluster)  # its options are not typed
    return clusters(
        startup_nodes=[ClusterNode(host, port) for host, port in address.nodes], **options
    )


def _sentinel(address: Address, options: dict[str, Any], timeout_s: float) -> redis.asyncio.Redis:
    for name in ("host", "port"):
        options.pop(name, None)
    tls: dict[str, Any] = {}
    if "connection_class" in options:  # rediss
        del options["connection_class"]
        tls = {"ssl": True} | {n: v for n, v in options.items() if n.startswith("ssl_")}
        options["ssl"] = True
    sentinels = redis.asyncio.sentinel.Sentinel(
        list(address.nodes),
        sentinel_kwargs={
            "socket_timeout": HOT_CONNECT_TIMEOUT_S,
            "socket_connect_timeout": HOT_CONNECT_TIMEOUT_S,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "driver_info": None,
            **address.sentinel_login,
            **tls,
        },
    )
    pool = _SentinelPool(address.service, sentinels, timeout=timeout_s, **options)
    return redis.asyncio.Redis.from_pool(pool)


class _SentinelPool(  # pyright: ignore[reportIncompatibleMethodOverride] - of the library's own two
    redis.asyncio.sentinel.SentinelConnectionPool, redis.asyncio.BlockingConnectionPool
):
    """Follows the primary that Sentinels name, and lets callers wait for a free connection.

    A primary that was replaced on demand takes writes for some ten seconds more, until a Sentinel
    turns it into a replica; all of them are lost. So the Sentinels are asked again and again while
    the pool is used, beside the calls, and connections to anything else are given up.
    """

    sentinel_manager: redis.asyncio.sentinel.Sentinel
    master_address: tuple[str, int] | None
    _asked_s: float = 0.0
    _asking: asyncio.Task[None] | None = None

    async def get_connection(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - as the library has it
        """Give a free connection to the primary."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._asked_s >= ASK_S and (self._asking is None or self._asking.done()):
            self._asked_s = loop.time()
            self._asking = loop.create_task(self._follow())
        pool = cast("Any", super())  # its arguments are not typed
        return await pool.get_connection(*args, **options)

    async def aclose(self) -> None:
        """Close the connections to the primary, and those to the Sentinels."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        await super().aclose()
        await self.sentinel_manager.aclose()

    async def ensure_connection(self, connection: Any) -> None:  # noqa: ANN401 - as the library has it
        """Make a connection ready; one to what is the primary no more is opened anew first.

        Asked for each use: that the primary is another can be learnt by any connection in the
        making, while others are in use, or on their way to where the primary was.
        """
        if connection.is_connected and (connection.host, connection.port) != self.master_address:
            await connection.disconnect()
        await cast("Any", super()).ensure_connection(connection)

    async def _follow(self) -> None:
        with contextlib.suppress(*TROUBLES):  # who needs a connection will say so
            await cast("Any", self).get_master_address()


class PasswordFile(CredentialProvider):
    """Gives the password that stands in a file now."""

    def __init__(self, path: Path, user: str | None) -> None:
        self._path = path
        self._user = user

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Read the file; a file that is gone is trouble with authentication, not with us."""
        try:
            password = self._path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise redis.exceptions.AuthenticationError(
                f"the password file {self._path} cannot be read: {reason}"
            ) from error
        return (self._user, password) if self._user else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """Do the same beside the event loop: the file may lie on a network."""
        return await asyncio.to_thread(self.get_credentials)
