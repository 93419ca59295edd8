"""A TCP link that can be cut: a small relay between two processes, for drills of partitions.

Three faults, each on a running link:

- `silent`: nothing passes in either direction, no connection is refused and none ends. That is how
  a partition looks to both ends; their kernels still acknowledge, so it is noticed by deadlines.
- `refuse`: every connection is reset, and new ones at once.
- `slow`: each piece of data waits for `delay_ms` in each direction.

A link costs a copy of every byte, so meshes have links only if asked for. Bounded: what is read is
written before more is read, so a slow reader slows the writer down, as without a link.
"""

import asyncio
import contextlib
import socket
import struct
from enum import StrEnum
from typing import Final

import msgspec

READ_BYTES: Final = 1 << 16
CONNECT_S: Final = 5.0


class Mode(StrEnum):
    """What a link does."""

    OPEN = "open"
    SILENT = "silent"
    REFUSE = "refuse"
    SLOW = "slow"


class LinkSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One link: who connects to `host`:`port` comes out at the target."""

    name: str
    host: str
    port: int
    target_host: str
    target_port: int


class Link:
    """One relay. `serve` listens until cancelled; `set_mode` takes effect at once."""

    def __init__(self, spec: LinkSpec) -> None:
        self.spec = spec
        self.target = (spec.target_host, spec.target_port)
        """Where new connections go."""
        self._mode = Mode.OPEN
        self._delay_s = 0.0
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def set_mode(self, mode: Mode, delay_ms: float = 0.0) -> None:
        """Change what the link does."""
        self._mode = mode
        self._delay_s = delay_ms / 1000
        if mode is Mode.SILENT:
            self._open.clear()
        else:
            self._open.set()
        if mode is Mode.REFUSE:
            for writer in list(self._writers):
                _reset(writer)

    async def serve(self, ready: asyncio.Event) -> None:
        """Relay until cancelled; raises OSError when the port is taken."""
        server = await asyncio.start_server(
            self._accept, self.spec.host, self.spec.port, limit=READ_BYTES
        )
        ready.set()
        try:
            async with server:
                await server.serve_forever()
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._relay(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        ends = [writer]
        try:
            if self._mode is Mode.REFUSE:
                _reset(writer)
                return
            await self._open.wait()
            async with asyncio.timeout(CONNECT_S):
                far_reader, far_writer = await asyncio.open_connection(
                    *self.target, limit=READ_BYTES
                )
            self._writers.add(far_writer)
            ends.append(far_writer)
            for end in ends:
                end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer))
                group.create_task(self._pump(far_reader, writer))
        except* OSError:
            for end in ends:  # one side broke: break the other in the same way
                _reset(end)
        finally:
            for end in ends:
                self._writers.discard(end)
                end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(READ_BYTES):
            if self._delay_s and self._mode is Mode.SLOW:
                await asyncio.sleep(self._delay_s)
            await self._open.wait()
            writer.write(data)
            await writer.drain()
        await self._open.wait()  # the end of a stream does not pass a cut link either
        with contextlib.suppress(OSError):
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset, as the kernel of a dead process's host does."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
