"""What drills keep in Redis: the mark of a production fleet, and wishes to agents.

A wish is one string with a time to live, written only where none is. Who deletes it may act on it,
so it is acted upon at most once, and never late.
"""

from typing import Final, TypeVar

import msgspec

from shared.models.drill import DrillWish, Production
from shared.registry.connection import Connection
from shared.registry.keys import Keys

WISH_TTL_MS: Final = 5_000
"""An agent looks twice a second; what it has not taken by then is not wished any more."""

T = TypeVar("T")


class Drills:
    """The records that drills use."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys.fleet

    async def production(self) -> Production | None:
        """Read the mark; one that does not parse is a mark all the same."""
        raw = await self._connection.command("GET", self._keys.production)
        if raw is None:
            return None
        return _parsed(raw, Production) or Production(since_ms=0, by="somebody")

    async def mark_production(self, mark: Production | None) -> None:
        """Set the mark, or remove it."""
        if mark is None:
            await self._connection.command("DEL", self._keys.production)
        else:
            raw = msgspec.json.encode(mark)
            await self._connection.command("SET", self._keys.production, raw)

    async def wish(self, host: str, wish: DrillWish) -> bool:
        """Put a wish to the agent of `host`; False while it has another one."""
        key, raw = self._keys.drill(host), msgspec.json.encode(wish)
        reply = await self._connection.command("SET", key, raw, "NX", "PX", WISH_TTL_MS)
        return reply is not None

    async def take(self, host: str) -> DrillWish | None:
        """Take the wish to `host`, as its agent: whoever gets it is the only one."""
        key = self._keys.drill(host)
        raw = await self._connection.command("GET", key)
        if raw is None or await self._connection.command("DEL", key) != 1:
            return None
        return _parsed(raw, DrillWish)


def _parsed(raw: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
