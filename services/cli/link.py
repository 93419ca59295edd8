"""A TCP link that can be cut: a small relay between processes, for drills of partitions.

A cut link is silent: nothing passes in either direction, no connection is refused and none ends.
That is how a partition looks to both ends; what one end has written is acknowledged by the kernel
in between, so it is noticed by deadlines only. A cut can be limited to the connections of some
processes of this machine, so that one proxy is cut off while everybody else goes on.

A link costs a copy of every byte, so meshes have links only if asked for. Bounded: what is read is
written before more is read, so a slow reader slows the writer down, as without a link.
"""

import asyncio
import contextlib
import socket
import struct
from typing import Final

import msgspec
import psutil

READ_BYTES: Final = 1 << 16
CONNECT_S: Final = 5.0


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    """Silence on one link."""

    link: str
    """Name of the link: where it listens."""
    pids: tuple[int, ...] = ()
    """Only connections that these processes make; empty: all."""


class Link:
    """One relay from `host`:`port`. `serve` listens until cancelled; cuts take effect at once."""

    def __init__(self, host: str, port: int, target: tuple[str, int]) -> None:
        self.name = f"{host}:{port}"
        self.target = target
        """Where new connections go."""
        self._at = (host, port)
        self._cut: Cut | None = None
        self._gates: dict[asyncio.StreamWriter, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def cut(self, cut: Cut | None) -> None:
        """Silence the link as `cut` says, or open it again."""
        self._cut = cut
        ports = _ports(cut)
        for writer, gate in self._gates.items():
            if _hit(writer, ports):
                gate.clear()
            else:
                gate.set()

    async def serve(self) -> None:
        """Relay until cancelled; raises OSError when the port is taken."""
        server = await asyncio.start_server(self._accept, *self._at, limit=READ_BYTES)
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
        gate = asyncio.Event()
        if not (self._cut is not None and _hit(writer, _ports(self._cut))):
            gate.set()
        self._gates[writer] = gate
        ends = [writer]
        try:
            await gate.wait()
            async with asyncio.timeout(CONNECT_S):
                far_reader, far_writer = await asyncio.open_connection(
                    *self.target, limit=READ_BYTES
                )
            ends.append(far_writer)
            for end in ends:
                end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, far_writer, gate))
                group.create_task(_pump(far_reader, writer, gate))
        except* OSError:
            await gate.wait()
            for end in ends:  # one side broke: break the other in the same way
                _reset(end)
        finally:
            del self._gates[writer]
            for end in ends:
                end.close()


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event
) -> None:
    while data := await reader.read(READ_BYTES):
        await gate.wait()
        writer.write(data)
        await writer.drain()
    await gate.wait()  # the end of a stream does not pass a cut link either
    with contextlib.suppress(OSError):
        writer.write_eof()


def _ports(cut: Cut | None) -> frozenset[int] | None:
    """Give the local ports that the cut's processes use; None for every port."""
    if cut is None:
        return frozenset()
    if not cut.pids:
        return None
    ports: set[int] = set()
    for pid in cut.pids:
        with contextlib.suppress(psutil.Error):
            ports |= {each.laddr.port for each in psutil.Process(pid).net_connections("tcp4")}
    return frozenset(ports)


def _hit(writer: asyncio.StreamWriter, ports: frozenset[int] | None) -> bool:
    peer = writer.get_extra_info("peername")
    return ports is None or (peer is not None and peer[1] in ports)


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset, as the kernel of a dead process's host does."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
