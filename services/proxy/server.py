"""The public port: uvicorn with limits of ours, on a socket that we bind ourselves.

At its end uvicorn closes idle connections at once, whatever may be on its way; ours end in stages
(see `draining`). Signals belong to the service, not to the server. What happens on one connection
is the `protocol`'s.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Generator
from typing import Any, Final, cast

import uvicorn
from litestar import Litestar

from services.proxy.api.hot import HotRoutes
from services.proxy.draining import Ending, Refuser
from services.proxy.lane import Lane
from services.proxy.protocol import LimitedProtocol
from services.proxy.settings import ProxySettings
from shared.errors import RedmeshError

SWEEP_S: Final = 1.0
LEAVE_SWEEP_S: Final = 0.05
BACKLOG: Final = 4096
STOP_S: Final = 5.0
"""After answers were ended at the drain deadline, their last bytes get this long."""


class PortTakenError(RedmeshError):
    """The public port cannot be bound."""


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Bind the public port; raises PortTakenError with one clear line.

    With `shared` other processes bind it, too, and nobody listens yet: the kernel would give this
    socket its share of the connections before somebody takes them.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise PortTakenError(
            f"cannot resolve --host {host!r}: {error.strerror or error}"
        ) from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind(address)
        if not shared:
            bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise PortTakenError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; "
            "stop what uses it, or give another --port"
        ) from error
    bound.setblocking(False)
    return bound


class Server(uvicorn.Server):
    """uvicorn, with signals left to the service, and an end in stages."""

    def __init__(self, config: uvicorn.Config, ending: Ending) -> None:
        super().__init__(config)
        self.ending = ending

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave signals alone."""
        yield

    def leave(self) -> None:
        """Say with every answer from now on that it is the last one of its connection."""
        self.ending.leaving = True
        for connection in self._connections():
            connection.leave()

    def refuse(self) -> None:
        """Answer 503 to whatever is asked from now on."""
        self.ending.refusing = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening; return once the last connection has ended."""
        loop = asyncio.get_running_loop()
        # Who waits to be accepted believes to be connected, and would be reset.
        late = [accepted for each in sockets or () for accepted in _accept_all(each)]
        self.ending.unheard_s = loop.time()
        async with asyncio.TaskGroup() as group:
            for accepted in late:
                group.create_task(self._take(accepted))
            leaving = group.create_task(self._leave_idle())
            await super().shutdown(sockets)
            leaving.cancel()

    async def sweep_connections(self) -> None:
        """Close the connections of clients that take too long, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = loop.time()
            for connection in self._connections():
                connection.sweep(now_s)

    async def _take(self, accepted: socket.socket) -> None:
        made = self.config.http_protocol_class
        with contextlib.suppress(OSError):  # it may have left already
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: cast("Any", made)(
                    config=self.config,
                    server_state=self.server_state,
                    app_state=self.lifespan.state,
                ),
                accepted,
            )

    async def _leave_idle(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LEAVE_SWEEP_S)
            now_s = loop.time()
            for connection in self._connections():
                connection.leave_if_idle(now_s)

    def _connections(self) -> list[LimitedProtocol]:
        return cast("list[LimitedProtocol]", list(self.server_state.connections))


def make_server(app: Litestar, settings: ProxySettings, hot: HotRoutes | None = None) -> Server:
    """Make the server of the public port: usual requests go to `hot`, all others to `app`."""
    # A cut answer is meant to end without its end; uvicorn calls that a fault of the application.
    logging.getLogger("uvicorn.error").addFilter(_not_about_cut_answers)
    ending = Ending()

    class Protocol(LimitedProtocol):
        limits = settings

    if hot is not None:
        Protocol.lane = Lane(
            hot.enter,
            hot.refuse,
            max_body_bytes=settings.max_body_bytes,
            body_timeout_s=settings.body_timeout_s,
        )
    Protocol.ending = ending
    Protocol.refuser = Refuser(app, ending, max_body_bytes=settings.max_body_bytes)
    config = uvicorn.Config(
        cast("Any", app),
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=round(settings.drain_timeout_s + STOP_S),
    )
    return Server(config, ending)


def _accept_all(listening: socket.socket) -> list[socket.socket]:
    """Accept every connection that the kernel has made already."""
    accepted: list[socket.socket] = []
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listening.accept()
            connection.setblocking(False)
            accepted.append(connection)
    return accepted


def _not_about_cut_answers(record: logging.LogRecord) -> bool:
    return "without completing response" not in record.getMessage()
