"""Properties that every script has, proven by running all of them on real servers."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
import redis.asyncio

from shared.errors import CorruptRecordError, RegistryUnavailableError
from shared.registry import Registry
from shared.registry.connection import Argument, Connection, connect
from shared.registry.keys import FLEET_KEYS, MODEL_KEYS, Keys
from shared.registry.ledger import Release, Reserve
from shared.registry.loader import ScriptLibrary, ScriptSpec
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.lua.exercise import MODEL, STREAM, Recorder, lead, make_ready, tour
from tests.support.servers import RedisCluster, RedisServer, Servers
from tests.support.waiting import wait_until_sync

TIMED = ("px", "hb", "suspect", "stat")
"""Keys that hold when something happened last: a repeat moves the time, nothing else."""
LEASE = (b"lease", b"read")
"""Fields of the same kind."""


async def dump(connection: Connection, keys: Keys) -> dict[str, Any]:
    """Read everything under the prefix that is not a time."""
    names = [keys.model(MODEL).prefix + name for name in MODEL_KEYS if "<" not in name]
    names += [keys.model(MODEL).lease(proxy) for proxy in ("p0", "p1")]
    names += [keys.fleet.prefix + name for name in FLEET_KEYS if "<" not in name]
    names += [keys.fleet.orders("h1"), keys.fleet.orders("h2")]
    names += [keys.stream(STREAM).meta, keys.stream(STREAM).tokens]
    found: dict[str, Any] = {}
    for name in names:
        kind = (await connection.command("TYPE", name)).decode()
        if kind == "hash":
            found[name] = await connection.command("HGETALL", name)
            for field in LEASE:
                found[name].pop(field, None)
        elif name == keys.stream(STREAM).tokens:
            found[name] = await connection.command("XRANGE", name, "-", "+")
        elif kind == "zset":
            found[name] = await connection.command("ZRANGE", name, 0, -1, "WITHSCORES")
        elif kind == "string":
            found[name] = await connection.command("GET", name)
        if name.rpartition(":")[2] in TIMED and name in found:
            found[name] = sorted(str(item) for item in found[name])[:0]
    return found


class Twice(Recorder):
    """A connection whose replies get lost once: every script runs again with the same arguments."""

    keys: Keys

    async def evalsha(
        self, script: ScriptSpec, keys: Sequence[str | bytes], args: Sequence[Argument]
    ) -> Any:  # noqa: ANN401 - any reply
        """Run, run again, and compare the data."""
        # The tour takes longer than a lease where the machine is busy: its end is no change.
        await self.command("PEXPIRE", self.keys.fleet.leader, 5000)
        reply = await super().evalsha(script, keys, args)
        before = await dump(self, self.keys)
        again = await super().evalsha(script, keys, args)
        assert await dump(self, self.keys) == before, script.name
        if script.name == "ledger/hot":
            assert [part for part in again if isinstance(part, bytes)] == [
                part for part in reply if isinstance(part, bytes)
            ]
        return reply


async def test_every_script_answers_what_it_declares(
    door: Registry, connection: Connection, library: ScriptLibrary
) -> None:
    """Every script runs on every server, and its status is from its closed list."""
    recorder = Recorder.over(connection)
    await tour(Registry.over(recorder, door.keys))
    assert {call.script.name for call in recorder.calls} == set(library.names)
    for call in recorder.calls:
        if call.script.statuses:
            assert call.reply[0].decode() in call.script.statuses
        assert None not in call.reply


async def test_a_repeat_changes_nothing(door: Registry, connection: Connection) -> None:
    """Run again after a lost reply, each script leaves all data as it is."""
    twice = Twice.over(connection)
    assert isinstance(twice, Twice)
    twice.keys = door.keys
    await tour(Registry.over(twice, door.keys))


async def test_scripts_are_forgotten_and_found_again(
    door: Registry, connection: Connection, backend: object
) -> None:
    """After SCRIPT FLUSH (or a failover) every script runs as before."""
    recorder = Recorder.over(connection)
    await tour(Registry.over(recorder, door.keys))
    for node in backend.nodes if isinstance(backend, RedisCluster) else [backend]:
        if isinstance(node, RedisServer):
            await asyncio.to_thread(node.command, "SCRIPT", "FLUSH")
        else:
            await connection.command("SCRIPT", "FLUSH")
    for call in recorder.calls:
        await connection.evalsha(call.script, call.keys, call.args)


async def test_only_declared_keys_are_touched(
    redis_server: RedisServer, registry: Registry, library: ScriptLibrary
) -> None:
    """Every key that a script touches is among its KEYS, by the server's own account."""
    for name in library.names:  # known by their hash, whichever test is the first of a session
        redis_server.command("SCRIPT", "LOAD", library[name].text)
    recorder = Recorder.over(registry.connection)
    client = redis.asyncio.Redis(port=redis_server.port, protocol=2)
    seen: list[Mapping[str, Any]] = []
    async with client, client.monitor() as monitor:
        running = asyncio.ensure_future(tour(Registry.over(recorder, registry.keys)))
        while not (running.done() and any("END-OF-TOUR" in entry["command"] for entry in seen)):
            if running.done():
                await running
                await registry.connection.command("ECHO", "END-OF-TOUR")
            async with asyncio.timeout(10):
                seen.append(cast("Mapping[str, Any]", await monitor.next_command()))
    declared: set[str] = set()
    touched = 0
    for entry in seen:
        words = str(entry["command"]).split(" ")
        if words[0] in {"EVAL", "EVALSHA"} and entry["client_type"] != "lua":
            count = int(words[2]) if words[0] == "EVALSHA" else 0
            declared = set(words[3 : 3 + count])
        elif entry["client_type"] == "lua" and declared and words[0] not in {"TIME", "PUBLISH"}:
            keys = redis_server.command("COMMAND", "GETKEYS", *words)
            touched += 1
            assert {key.decode() for key in keys} <= declared, entry["command"]
    assert touched > 200


async def test_demoted_primary(servers: Servers, library: ScriptLibrary) -> None:
    """A primary that became a replica answers READONLY to every script, never something old."""
    primary, other = servers.redis(), servers.new()
    keys = Keys("demoted")
    connection = await connect(CommonSettings(redis_url=Secret(other.url), key_prefix="demoted"))
    recorder = Recorder.over(connection)
    await tour(Registry.over(recorder, keys))
    other.command("REPLICAOF", "127.0.0.1", primary.port)
    names: set[str] = set()
    for call in recorder.calls:
        with pytest.raises(RegistryUnavailableError, match=r"replica now|READONLY|LOADING"):
            await connection.evalsha(call.script, call.keys, call.args)
        names.add(call.script.name)
    assert names == set(library.names)
    other.command("REPLICAOF", "NO", "ONE")
    await connection.ping()
    await connection.aclose()


async def test_out_of_memory(servers: Servers) -> None:
    """When memory is over its limit, a release still works and totals stay true."""
    server = servers.new("--maxmemory-policy", "noeviction")
    connection = await connect(CommonSettings(redis_url=Secret(server.url)))
    registry = Registry.over(connection, Keys())
    fence = await lead(registry)
    await make_ready(registry, fence, "r1")
    await registry.ledger.batch(MODEL, "p1", [Reserve("a", 5, 0), Reserve("b", 6, 0)])
    server.command("CONFIG", "SET", "maxmemory", "1")
    reply = await registry.ledger.batch(MODEL, "p1", [Release("a")])
    assert reply.results == [True]
    totals = await registry.ledger.totals(MODEL)
    assert totals["r1"] == totals["*"] == (6, 1)
    with pytest.raises(RegistryUnavailableError, match="maxmemory"):
        await connection.command("SET", "k", "v")
    await connection.aclose()


async def test_foreign_type(registry: Registry) -> None:
    """A key of ours that holds a foreign type is reported by name, before anything is done."""
    keys = registry.keys.model(MODEL)
    for name in ("ready", "cost", "nreq", "px"):
        key = keys.prefix + name
        await registry.connection.command("DEL", key)
        await registry.connection.command("SET", key, "foreign")
        with pytest.raises(CorruptRecordError, match="foreign data"):
            await registry.ledger.batch(MODEL, "p1", [Reserve("a", 1, 0)])
        assert await registry.ledger.leases(MODEL, "p1") == {}
        await registry.connection.command("DEL", key)


async def test_restart(servers: Servers) -> None:
    """A connection survives the restart of its server, and loads the scripts again."""
    server = servers.new()
    connection = await connect(CommonSettings(redis_url=Secret(server.url)))
    registry = Registry.over(connection, Keys())
    await tour(registry)
    await asyncio.to_thread(server.kill)
    with pytest.raises(RegistryUnavailableError):
        await registry.ledger.beat(MODEL, "p1")
    await asyncio.to_thread(server.start)
    await asyncio.to_thread(wait_until_sync, lambda: server.command("PING"))
    beat = await registry.ledger.beat(MODEL, "p1")
    assert (beat.leases, beat.known) == (0, False)
    await connection.aclose()
