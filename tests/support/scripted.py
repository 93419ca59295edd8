"""A server of the test's own that speaks Redis' protocol as badly as the test wants.

It lives in the test's event loop. Each command that arrives is given to `act`, which says what
happens: bytes are sent as they are, after a `Last` or a `CUT` the connection ends, and after a
`SILENT` it says nothing any more.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final, Self, cast

import hiredis

from tests.support.waiting import wait_until

CUT: Final = "cut"
SILENT: Final = "silent"

Act = Callable[[list[bytes]], bytes | str]
"""Command → what is sent, or `CUT`, or `SILENT`."""


class Last(bytes):
    """What is sent before the connection ends."""

    __slots__ = ()


class ScriptedServer:
    """Listens on loopback. Use as an async context manager."""

    def __init__(self, act: Act) -> None:
        self.act = act
        self.connections = 0
        """How many were accepted."""
        self.commands: list[list[bytes]] = []
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        """The same as a URL."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def open(self) -> int:
        """How many connections there are."""
        return len(self._writers)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await wait_until(lambda: not self._writers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        parser: Any = hiredis.Reader()
        silent = False
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(1 << 16):
                    parser.feed(data)
                    while (command := parser.gets()) is not False:
                        self.commands.append(command)
                        if silent:
                            continue
                        done = self.act(cast("list[bytes]", command))
                        silent = done == SILENT
                        if isinstance(done, bytes):
                            writer.write(done)
                        if done == CUT or isinstance(done, Last):
                            return
        finally:
            self._writers.discard(writer)
            writer.close()
