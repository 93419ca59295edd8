"""Foreign data in the fleet's keys are moved away in one act: what belongs there is never moved."""

from collections.abc import Sequence
from typing import Any

import pytest

from shared.registry import Registry
from shared.registry.connection import Argument, Connection
from shared.registry.keys import FLEET_KEYS, HOST_PART
from shared.registry.loader import ScriptSpec

FOREIGN: dict[str, tuple[str | int, ...]] = {
    "hash": ("HSET", "field", "value"),
    "zset": ("ZADD", 1, "member"),
    "list": ("RPUSH", "item"),
    "string": ("SET", "text"),
    "stream": ("XADD", "*", "field", "value"),
}
"""Type → a command that makes such a key, without its name."""


async def put(registry: Registry, key: str, kind: str) -> None:
    """Have `key` hold a `kind`."""
    command, *rest = FOREIGN[kind]
    await registry.connection.command("DEL", key)
    await registry.connection.command(command, key, *rest)


@pytest.mark.parametrize("found", FOREIGN)
async def test_what_is_of_another_type_is_moved_and_kept(door: Registry, found: str) -> None:
    """Whatever type a fleet key holds, it stays if it belongs there, else it is kept for a week."""
    command, keys = door.connection.command, door.keys.fleet
    for suffix, kind in FLEET_KEYS.items():
        if "<" in suffix and suffix != HOST_PART:
            continue
        key = keys.prefix + suffix.replace("<host>", "h")
        await put(door, key, found)
        for moved in (kind != found, False):  # a repeat finds nothing to move
            assert await door.fleet.set_aside(key, kind) is moved, suffix
        aside = keys.aside(key)
        where = aside if kind != found else key
        assert (await command("TYPE", where)).decode() == found
        assert await command("EXISTS", key, aside) == 1
        assert kind == found or 6 * 24 * 3600 < await command("TTL", aside) <= 7 * 24 * 3600
        await command("DEL", key, aside)


class Healing(Connection):
    """A connection between two of whose commands somebody writes what belongs there."""

    key: str

    async def _heal(self) -> None:
        await super().command("DEL", self.key)
        await super().command("HSET", self.key, "m", "declared anew")

    async def evalsha(
        self, script: ScriptSpec, keys: Sequence[str | bytes], args: Sequence[Argument]
    ) -> Any:  # noqa: ANN401 - any reply
        """Run a script; then the key is written."""
        reply = await super().evalsha(script, keys, args)
        await self._heal()
        return reply

    async def command(self, *parts: Argument) -> Any:  # noqa: ANN401 - any reply
        """Run a command; then the key is written."""
        reply = await super().command(*parts)
        await self._heal()
        return reply


async def test_what_another_has_just_written_stays(door: Registry, connection: Connection) -> None:
    """Of two controllers that see the foreign data, the slower one moves nothing that is good."""
    key = door.keys.fleet.deployments
    await put(door, key, "list")
    healing = Healing.__new__(Healing)
    healing.__dict__.update(connection.__dict__, key=key)
    assert await Registry.over(healing, door.keys).fleet.set_aside(key, "hash")
    assert await door.connection.command("HGETALL", key) in (
        {b"m": b"declared anew"},
        [b"m", b"declared anew"],
    )
    aside = door.keys.fleet.aside(key)
    assert await door.connection.command("LRANGE", aside, 0, -1) == [b"item"]
    await door.connection.command("DEL", key, aside)
