"""Pools of connections to replicas, and what a request's head needs to say to each.

Idle connections are used last in, first out, so that a quiet pool shrinks. An endpoint belongs to
one incarnation of a replica: its key, its breaker and its connections end with it.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urlsplit

from services.proxy.breaker import ReplicaBreaker
from services.proxy.upstream import Connection, Familiar
from shared.models.replica import Replica
from shared.secret import Secret, replica_api_key

Connected = Callable[[Connection | None, str], None]
"""Called with a connection, or with None and the reason why there is none."""

MAX_IDLE: Final = 1024

GONE_S: Final = 6
"""A host that acknowledges nothing for this long is gone: time for five retransmissions."""
_TCP_OPTIONS: Final = (
    # Whatever was sent, a request above all, must be acknowledged; and while nothing is sent,
    # probes ask, so that a host that vanished in the middle of a stream is missed as soon. The
    # kernel of a host answers both for an engine that is busy or frozen: those have deadlines
    # of their own.
    ("TCP_USER_TIMEOUT", GONE_S * 1000),
    ("TCP_KEEPIDLE", 2),
    ("TCP_KEEPINTVL", 1),
    ("TCP_KEEPCNT", GONE_S - 2),
)


class Endpoint:
    """Where and how one incarnation of a replica is reached."""

    def __init__(
        self, replica: Replica, key: str, *, idle_s: float, connect_timeout_s: float
    ) -> None:
        parts = urlsplit(replica.url)
        self.rid = replica.rid
        self.gen = replica.gen
        self.url = replica.url
        self.breaker = ReplicaBreaker()
        self.familiar = Familiar()
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/").encode()
        authorization = f"authorization: Bearer {key}\r\n" if key else ""
        self._head = (
            f" HTTP/1.1\r\nhost: {parts.netloc.rpartition('@')[2]}\r\n{authorization}"
            "content-type: application/json\r\naccept-encoding: identity\r\nx-request-id: "
        ).encode()
        self._idle_s = idle_s
        self._connect_timeout_s = connect_timeout_s
        self._idle: dict[Connection, None] = {}
        self._connecting: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._closed = False

    def request(self, path: bytes, request_id: bytes, body: bytes) -> bytes:
        """Build a POST request in one piece."""
        return b"".join(
            (
                b"POST ",
                self._prefix,
                path,
                self._head,
                request_id,
                b"\r\ncontent-length: %d\r\n\r\n" % len(body),
                body,
            )
        )

    def take(self) -> Connection | None:
        """Take an idle connection that is fresh enough, if there is one."""
        idle = self._idle
        oldest_s = self._loop.time() - self._idle_s
        while idle:
            connection, _ = idle.popitem()
            if connection.idle_since_s < oldest_s:
                # Last in, first out: everything below is older still.
                connection.abort()
                self._drop_idle()
                return None
            if connection.usable:
                return connection
        return None

    def connect(self, connected: Connected) -> asyncio.Task[None]:
        """Open a connection and call `connected`; cancel the task to give up (it is not called)."""
        task = self._loop.create_task(self._connect(connected), name=f"connect-{self.rid}")
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return task

    async def _connect(self, connected: Connected) -> None:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                transport, connection = await self._loop.create_connection(
                    lambda: Connection(self), self._host, self._port, ssl=self._tls
                )
                _notice_silence(transport)
        except TimeoutError:
            connected(None, f"no connection within {self._connect_timeout_s:g} s")
        except (OSError, UnicodeError) as error:
            connected(None, getattr(error, "strerror", None) or str(error))
        else:
            connected(connection, "")

    def idle(self, connection: Connection) -> None:
        """Take back a connection that can carry another request."""
        if self._closed or len(self._idle) >= MAX_IDLE:
            connection.abort()
            return
        connection.idle_since_s = self._loop.time()
        self._idle[connection] = None

    def gone(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        self._idle.pop(connection, None)

    def sweep(self, now_s: float) -> None:
        """Close connections that were idle for too long."""
        oldest_s = now_s - self._idle_s
        for connection in list(self._idle):
            if connection.idle_since_s >= oldest_s:
                break
            del self._idle[connection]
            connection.abort()

    def close(self) -> None:
        """Close what is idle; connections in use are closed when their answers end."""
        self._closed = True
        self._drop_idle()

    async def aclose(self) -> None:
        """Close, and end connection attempts."""
        self.close()
        attempts = list(self._connecting)
        for task in attempts:
            task.cancel()
        await asyncio.gather(*attempts, return_exceptions=True)

    def _drop_idle(self) -> None:
        idle, self._idle = self._idle, {}
        for connection in idle:
            connection.abort()


def _notice_silence(transport: asyncio.BaseTransport) -> None:
    """Have the kernel end a connection whose other end has vanished without a word."""
    opened: socket.socket = transport.get_extra_info("socket")
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _TCP_OPTIONS:
        option: int | None = getattr(socket, name, None)  # not every system has them all
        if option is not None:
            opened.setsockopt(socket.IPPROTO_TCP, option, value)


class Endpoints:
    """The endpoints of all replicas, made when first needed."""

    def __init__(
        self,
        fleet_secret: Secret,
        environ: Mapping[str, str],
        *,
        idle_s: float,
        connect_timeout_s: float,
    ) -> None:
        self._fleet_secret = fleet_secret
        self._environ = environ
        self._idle_s = idle_s
        self._connect_timeout_s = connect_timeout_s
        self._by_rid: dict[str, Endpoint] = {}

    def of(self, replica: Replica) -> Endpoint:
        """Give the endpoint of this incarnation; that of an older one is closed."""
        endpoint = self._by_rid.get(replica.rid)
        if endpoint is not None:
            if endpoint.gen == replica.gen and endpoint.url == replica.url:
                return endpoint
            endpoint.close()
        endpoint = Endpoint(
            replica,
            self._key(replica),
            idle_s=self._idle_s,
            connect_timeout_s=self._connect_timeout_s,
        )
        self._by_rid[replica.rid] = endpoint
        return endpoint

    def sweep(self, now_s: float, known: set[str]) -> None:
        """Close idle connections, and forget replicas that no table knows any more."""
        for rid, endpoint in list(self._by_rid.items()):
            endpoint.sweep(now_s)
            if rid not in known:
                endpoint.close()
                del self._by_rid[rid]

    async def aclose(self) -> None:
        """Close everything."""
        for endpoint in self._by_rid.values():
            await endpoint.aclose()
        self._by_rid.clear()

    def _key(self, replica: Replica) -> str:
        if replica.api_key_env is not None:
            return self._environ.get(replica.api_key_env, "")
        if not self._fleet_secret:
            return ""
        return replica_api_key(self._fleet_secret, replica.rid, replica.gen)
