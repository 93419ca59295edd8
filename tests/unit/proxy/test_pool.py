"""Connections to replicas: what the kernel is told about them."""

import asyncio
import socket
from collections.abc import Callable

import pytest
import uvloop

from services.proxy.pool import GONE_S, Endpoint
from services.proxy.upstream import Connection
from tests.unit.proxy.engine import Engine
from tests.unit.proxy.rig import replica


async def options() -> dict[str, int]:
    """Connect to an engine, and read what the connection was given."""
    async with Engine() as engine:
        endpoint = Endpoint(replica("demo-0", engine.url), "", idle_s=3, connect_timeout_s=5)
        made: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        endpoint.connect(lambda connection, _reason: made.set_result(connection))
        connection = await asyncio.wait_for(made, 5)
        assert connection is not None
        transport = connection._transport  # pyright: ignore[reportPrivateUsage] - the socket itself is what is asked
        assert transport is not None
        opened: socket.socket = transport.get_extra_info("socket")
        found = {
            "unacknowledged_ms": opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
            "probed": opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            "probed_after_s": opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
            "probed_every_s": opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
        }
        connection.abort()
        await endpoint.aclose()
        return found


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_the_kernel_is_told_to_notice_a_host_that_vanished(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """Unacknowledged data and unanswered probes end a connection within seconds, not 15 minutes."""
    with asyncio.Runner(loop_factory=loop) as runner:
        found = runner.run(options())
    assert found == {
        "unacknowledged_ms": GONE_S * 1000,
        "probed": 1,
        "probed_after_s": 2,
        "probed_every_s": 1,
    }
