"""Where servers are measured, and what one is once it runs."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final, NamedTuple

from tests.bench.machine import BenchError, Cores
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

START_S: Final = 120.0
ASK_AGAIN_S: Final = 0.2
"""Each question costs more than a server's own start can bear in quick succession."""


class Server(NamedTuple):
    """A server that runs."""

    name: str
    port: int
    pid: int | None
    """None if nothing stands before the replicas."""
    model: str = "bench"
    reserved: Callable[[], int] | None = None
    """Counts the reservations that it holds, where it holds any."""
    workers: int = 1
    """Processes that share the work; for each the load is what it is for a server with one."""


class Site(NamedTuple):
    """What a server needs to know to be started."""

    cores: Cores
    replica_ports: Sequence[int]
    folder: Path
    redis: RedisServer


Start = Callable[[Site], AbstractAsyncContextManager[Server]]


async def begun(condition: Callable[[], Awaitable[bool]], name: str, log: Path) -> None:
    """Wait until the server `name` has begun to serve.

    Raises BenchError with the end of its log if it does not.
    """
    try:
        await wait_until(
            condition, timeout_s=START_S, interval_s=ASK_AGAIN_S, what=f"{name} serves"
        )
    except AssertionError as error:
        raise BenchError(f"{error}; the end of its log:\n{_end_of(log)}") from None


async def listens(port: int) -> bool:
    """Tell whether somebody listens on `port`."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:] if log.exists() else ""
