"""A reserve costs the same at ten ready replicas and at a thousand, by the server's own clock."""

import shutil
import statistics
from pathlib import Path

import pytest
import redis.asyncio

from shared.registry import Registry
from shared.registry.connection import Connection
from shared.registry.ledger import Release, Reserve
from shared.registry.loader import ScriptLibrary, scripts_folder
from tests.support.servers import RedisServer

FEW, MANY = 10, 1000
BATCHES = 40
ROUNDS = 9
LIMIT = 2.0


def seconds_in_scripts(server: RedisServer) -> float:
    """Read how long the server has spent in EVALSHA, in seconds."""
    for line in server.command("INFO", "commandstats").decode().splitlines():
        if line.startswith("cmdstat_evalsha:"):
            values = dict(part.split("=") for part in line.split(":")[1].split(","))
            return int(values["usec"]) / 1e6
    return 0.0


async def fill(registry: Registry, model: str, count: int) -> None:
    """Put `count` ready replicas into a model, some of them loaded."""
    keys = registry.keys.model(model)
    ready = [part for n in range(count) for part in (n % 7 * 1000, f"r{n}")]
    weight = [part for n in range(count) for part in (f"r{n}", "1000 256 0")]
    await registry.connection.command("ZADD", keys.ready, *ready)
    await registry.connection.command("HSET", keys.weight, *weight)


async def cost_us(registry: Registry, server: RedisServer, model: str, batch: int) -> float:
    """Measure what one reserve with its release costs the server, in microseconds."""
    before = seconds_in_scripts(server)
    for number in range(BATCHES):
        exclude = ("r1",) if batch > 1 else ()
        ops = [
            Reserve(f"q{n}", 50, n * 7919 + number, (("r3", 40),), exclude) for n in range(batch)
        ]
        await registry.ledger.batch(model, "p1", ops)
        await registry.ledger.batch(model, "p1", [Release(op.request) for op in ops])
    return (seconds_in_scripts(server) - before) * 1e6 / BATCHES / batch


async def compare(
    registry: Registry, server: RedisServer, batch: int
) -> tuple[float, float, float]:
    """Measure few and many replicas in turns: medians in microseconds, and their ratio."""
    await fill(registry, "few", FEW)
    await fill(registry, "many", MANY)
    rounds = [
        (
            await cost_us(registry, server, "few", batch),
            await cost_us(registry, server, "many", batch),
        )
        for _ in range(ROUNDS)
    ]
    few, many = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(second / first for first, second in rounds)
    return few, many, ratio


@pytest.mark.parametrize("batch", [1, 16])
async def test_reserve_cost(
    registry: Registry, redis_server: RedisServer, capsys: pytest.CaptureFixture[str], batch: int
) -> None:
    """At 1,000 ready replicas a reserve costs at most twice what it costs at 10."""
    few, many, ratio = await compare(registry, redis_server, batch)
    with capsys.disabled():
        print(
            f"\nreserve + release, {batch} a batch, server time: {few:.1f} µs at {FEW} ready "
            f"replicas, {many:.1f} µs at {MANY}: ratio {ratio:.2f}"
        )
    assert ratio <= LIMIT


async def test_a_scan_would_be_noticed(
    registry: Registry, redis_server: RedisServer, scanning: ScriptLibrary
) -> None:
    """The measure tells a script that looks at every replica from one that does not."""
    client = redis.asyncio.Redis(port=redis_server.port, driver_info=None)
    connection = Connection(client, scanning)
    try:
        _, _, ratio = await compare(Registry.over(connection, registry.keys), redis_server, 16)
    finally:
        await connection.aclose()
    assert ratio > LIMIT


@pytest.fixture
def scanning(tmp_path: Path) -> ScriptLibrary:
    """Load the scripts with a choice that reads the whole ready set."""
    folder = tmp_path / "lua"
    shutil.copytree(scripts_folder(), folder)
    path = folder / "lib" / "choice.lua"
    text = path.read_text()
    bounded = "math.min(80, batch.reserves + batch.tries)"
    assert bounded in text
    path.write_text(text.replace(bounded, "5000"))
    return ScriptLibrary.load(folder)
