"""All rooms of the registry behind one door."""

from typing import Self

import msgspec

from shared.registry.connection import Connection, check_schema, connect, patiently
from shared.registry.drills import Drills
from shared.registry.fleet import Fleet
from shared.registry.keys import Keys
from shared.registry.leadership import Leadership
from shared.registry.ledger import Ledger
from shared.registry.replicas import Replicas
from shared.registry.routes import Routes
from shared.registry.specs import Specs
from shared.registry.streams import Streams
from shared.settings import CommonSettings


class Registry(msgspec.Struct, frozen=True, kw_only=True):
    """One connection and the rooms that use it."""

    connection: Connection
    keys: Keys
    ledger: Ledger
    replicas: Replicas
    specs: Specs
    leadership: Leadership
    fleet: Fleet
    drills: Drills
    routes: Routes
    streams: Streams

    @classmethod
    def over(cls, connection: Connection, keys: Keys) -> Self:
        """Furnish the rooms over an open connection."""
        return cls(
            connection=connection,
            keys=keys,
            ledger=Ledger(connection, keys),
            replicas=Replicas(connection, keys),
            specs=Specs(connection, keys),
            leadership=Leadership(connection, keys),
            fleet=Fleet(connection, keys),
            drills=Drills(connection, keys),
            routes=Routes(connection, keys),
            streams=Streams(connection, keys),
        )

    async def aclose(self) -> None:
        """Close the connection."""
        await self.connection.aclose()


async def open_registry(
    settings: CommonSettings, *, hot: bool = False, prove: bool = True
) -> Registry:
    """Connect to the Redis of `settings` and check that its data is of a schema we know.

    `hot` is for the data plane: short timeouts, no hidden retries. `prove` false connects later,
    when first used, and checks nothing: for a proxy that begins while Redis is away.
    Raises InvalidInputError, RegistryUnavailableError, RegistryRefusedError, SchemaVersionError.
    """
    keys = Keys(settings.key_prefix)
    connection = await connect(settings, hot=hot, prove=prove)
    try:
        if prove:
            await patiently(lambda: check_schema(connection, keys))
    except BaseException:
        await connection.aclose()
        raise
    return Registry.over(connection, keys)
