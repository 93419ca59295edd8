"""Where servers are measured, and what one is once it runs."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NamedTuple

from tests.bench.machine import Cores
from tests.support.servers import RedisServer


class Server(NamedTuple):
    """A server that runs."""

    name: str
    port: int
    pid: int | None
    """None if nothing stands before the replicas."""
    model: str = "bench"
    reserved: Callable[[], int] | None = None
    """Counts the reservations that it holds, where it holds any."""


class Site(NamedTuple):
    """What a server needs to know to be started."""

    cores: Cores
    replica_ports: Sequence[int]
    folder: Path
    redis: RedisServer


Start = Callable[[Site], AbstractAsyncContextManager[Server]]


async def listens(port: int) -> bool:
    """Tell whether somebody listens on `port`."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
