"""The client that follows Sentinels uses no connection to what was the primary."""

from typing import Any, Final

import pytest

from shared.registry.clients import make_client
from tests.support.servers import RedisServer, Servers

SERVICE: Final = "mymaster"


class Named:
    """What the Sentinels say: the address of the primary."""

    def __init__(self, primary: RedisServer) -> None:
        self.primary = primary

    async def discover_master(self, _service: str) -> tuple[str, int]:
        """Answer as the library's own manager of Sentinels does."""
        return ("127.0.0.1", self.primary.port)

    async def aclose(self) -> None:
        """Hold nothing."""


@pytest.mark.parametrize("how", ["in use", "idle", "on its way"])
async def test_no_connection_to_the_former_primary_is_used_again(
    servers: Servers, how: str
) -> None:
    """Whoever learns of the new primary, and whatever the others do at that time."""
    old, new = servers.new(), servers.new()
    client: Any = make_client(f"redis+sentinel://127.0.0.1:1/{SERVICE}", hot=True)
    pool: Any = client.connection_pool
    pool.sentinel_manager = named = Named(old)
    connection = await pool.get_connection()
    if how == "idle":
        await pool.release(connection)
    named.primary = new
    await pool.get_master_address()  # as any other connection in the making does
    if how == "on its way":
        await connection.connect_to(("127.0.0.1", old.port))
    if how != "idle":
        await pool.release(connection)
    try:
        for _ in range(2):
            assert (await client.info("server"))["tcp_port"] == new.port
        assert len(pool._available_connections) == 1, "the connection itself is used on"
    finally:
        await client.aclose()
