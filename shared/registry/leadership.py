"""The leader's lease: one controller at a time, each with a higher epoch than all before.

A lease alone does not make a leader safe: a paused one may wake up after its lease ended. Safety is
in the fence of every write; the lease only keeps two controllers from working at once.
"""

from typing import Final

import msgspec

from shared.ids import check_name
from shared.registry.connection import Connection
from shared.registry.keys import Keys
from shared.registry.loader import ScriptSpec
from shared.registry.results import text_of, whole_number

LEAD: Final = ScriptSpec(
    "leader/lead", "ctl", ("leader", "epoch"), ("LEADING", "FOLLOWING", "RESIGNED")
)
TTL_MS: Final = 5000


class Leading(msgspec.Struct, frozen=True):
    """We hold the lease. Count its time from before the request left, by the monotonic clock."""

    epoch: int
    ttl_left_ms: int


class Following(msgspec.Struct, frozen=True):
    """Somebody else holds the lease."""

    owner: str
    ttl_left_ms: int


class Leadership:
    """The leader's lease, as one controller sees it."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys.fleet.pick(LEAD.keys)

    async def try_lead(self, owner: str, ttl_ms: int = TTL_MS) -> Leading | Following:
        """Take the lease if it is free, renew it if it is ours."""
        args = (check_name("controller", owner), ttl_ms, "try")
        status, who, left_ms = await self._connection.evalsha(LEAD, self._keys, args)
        if status == b"LEADING":
            return Leading(whole_number(who), int(left_ms))
        return Following(text_of(who), int(left_ms))

    async def resign(self, owner: str) -> None:
        """Give the lease back if it is ours, so that a standby can take it at once."""
        await self._connection.evalsha(LEAD, self._keys, (owner, TTL_MS, "resign"))
