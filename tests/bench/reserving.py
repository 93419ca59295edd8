"""What the ledger carries: pairs of reserve and release, and what they cost proxy and Redis.

`python -m tests.bench.reserving` measures at 10, 100 and 1,000 replicas with 1, 2, 10 and 100
proxies. Redis has one core for itself, the proxies (in at most two processes) have the other. CPU
is that of the whole process: sockets, event loop and metrics are in it.
"""

import argparse
import asyncio
import os
import secrets
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from shared.registry import Registry, open_registry
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.bench.driving import Driven, Orders
from tests.bench.machine import BenchError, Cores
from tests.support.servers import RedisServer, any_binary, valkey_binary

REPLICAS: Final = (10, 100, 1000)
PROXIES: Final = (1, 2, 10, 100)
PROCESSES: Final = 2
ASKING: Final = 384
"""Reserves under way at once, of all proxies."""
HELD: Final = 256
"""Reservations held at once, of all proxies."""
WARM_S: Final = 1.5
"""Longer than a beat: the first one makes Redis keep tables."""
MODEL: Final = "bench"


class Reserving(msgspec.Struct, frozen=True, kw_only=True):
    """One measure, of one round or the median of several."""

    replicas: int
    proxies: int
    processes: int
    pairs_per_s: float
    ops_per_batch: float
    proxy_us: float
    """CPU of the proxies per pair."""
    redis_us: float
    """CPU of Redis per pair."""
    script_us: float
    """Of it in the script, by the server's own clock."""
    local: int
    """Reserves decided without the ledger: a good measure has none."""


class _Spent(msgspec.Struct, frozen=True):
    """What a server has used so far."""

    cpu_s: float
    script_s: float


def _pid(server: RedisServer) -> int:
    said = server.command("INFO", "server").decode()
    return int(next(x for x in said.splitlines() if x.startswith("process_id:")).split(":")[1])


def _spent(server: RedisServer) -> _Spent:
    fields: dict[str, str] = {}
    for section in ("CPU", "commandstats"):
        for line in server.command("INFO", section).decode().splitlines():
            name, _, value = line.partition(":")
            fields[name] = value
    script = dict(part.split("=") for part in fields.get("cmdstat_evalsha", "usec=0").split(","))
    return _Spent(
        float(fields["used_cpu_user"]) + float(fields["used_cpu_sys"]), int(script["usec"]) / 1e6
    )


async def _fill(registry: Registry, replicas: int) -> None:
    keys = registry.keys.model(MODEL)
    ready = [part for n in range(replicas) for part in (0, f"replica-{n}")]
    weight = [part for n in range(replicas) for part in (f"replica-{n}", "1000 100000 0")]
    await registry.connection.command("ZADD", keys.ready, *ready)
    await registry.connection.command("HSET", keys.weight, *weight)


async def _process(cores: Cores, orders: Orders) -> Driven:
    process = await asyncio.create_subprocess_exec(
        *cores.on_others(),
        *(sys.executable, "-m", "tests.bench.driving"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    output, _ = await process.communicate(msgspec.json.encode(orders) + b"\n")
    if process.returncode:
        raise BenchError(f"a process of proxies ended with {process.returncode}")
    return msgspec.json.decode(output, type=Driven)


async def measure(
    server: RedisServer, cores: Cores, replicas: int, proxies: int, seconds: float
) -> Reserving:
    """Measure once."""
    settings = CommonSettings(
        redis_url=Secret(server.url), key_prefix=f"bench{secrets.token_hex(4)}"
    )
    registry = await open_registry(settings)
    await _fill(registry, replicas)
    processes = min(PROCESSES, proxies)
    names = [f"px-{n}" for n in range(proxies)]
    orders = [
        Orders(
            url=server.url,
            prefix=settings.key_prefix,
            model=MODEL,
            names=tuple(names[n::processes]),
            asking=max(1, ASKING // proxies),
            held=HELD // proxies,
            warm_s=WARM_S,
            seconds=seconds,
        )
        for n in range(processes)
    ]
    before = await asyncio.to_thread(_spent, server)
    driven = await asyncio.gather(*(_process(cores, each) for each in orders))
    after = await asyncio.to_thread(_spent, server)
    await registry.connection.command("FLUSHALL")
    await registry.aclose()
    pairs = sum(each.pairs for each in driven)
    all_pairs = sum(each.all_pairs for each in driven)
    return Reserving(
        replicas=replicas,
        proxies=proxies,
        processes=processes,
        pairs_per_s=sum(each.pairs / each.seconds for each in driven),
        ops_per_batch=2 * pairs / max(1, sum(each.batches for each in driven)),
        proxy_us=sum(each.cpu_s for each in driven) / pairs * 1e6,
        redis_us=(after.cpu_s - before.cpu_s) / all_pairs * 1e6,
        script_us=(after.script_s - before.script_s) / all_pairs * 1e6,
        local=sum(each.local for each in driven),
    )


def median(rounds: Sequence[Reserving]) -> Reserving:
    """Give the medians of several rounds."""
    first = rounds[0]
    return msgspec.structs.replace(
        first,
        pairs_per_s=statistics.median(each.pairs_per_s for each in rounds),
        ops_per_batch=statistics.median(each.ops_per_batch for each in rounds),
        proxy_us=statistics.median(each.proxy_us for each in rounds),
        redis_us=statistics.median(each.redis_us for each in rounds),
        script_us=statistics.median(each.script_us for each in rounds),
        local=sum(each.local for each in rounds),
    )


async def reserve(
    server: RedisServer,
    cores: Cores,
    *,
    replicas: Sequence[int] = REPLICAS,
    proxies: Sequence[int] = PROXIES,
    rounds: int = 3,
    seconds: float = 2.0,
) -> list[Reserving]:
    """Measure every combination in interleaved rounds; give the medians."""
    cases = [(r, p) for r in replicas for p in proxies]
    measured: dict[tuple[int, int], list[Reserving]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            measured[case].append(await measure(server, cores, *case, seconds))
    return [median(each) for each in measured.values()]


def table(measures: Sequence[Reserving]) -> str:
    """Show the measures."""
    lines = [
        (
            f"{'replicas':>9}{'proxies':>9}{'pairs/s':>10}{'ops/batch':>11}"
            f"{'proxy µs':>10}{'Redis µs':>10}{'script µs':>11}{'local':>7}"
        )
    ]
    for each in measures:
        per_pair = f"{each.proxy_us:>10.1f}{each.redis_us:>10.1f}{each.script_us:>11.1f}"
        lines.append(
            f"{each.replicas:>9}{each.proxies:>9}{each.pairs_per_s:>10,.0f}"
            f"{each.ops_per_batch:>11.1f}{per_pair}{each.local:>7}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=REPLICAS)
    parser.add_argument("--proxies", type=int, nargs="+", default=PROXIES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--valkey", action="store_true", help="Valkey instead of redis-server")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            cores = Cores()
            program = valkey_binary() if options.valkey else any_binary()
            server = RedisServer(program, Path(folder) / "redis")
        except (BenchError, AssertionError) as error:
            sys.stderr.write(f"reserving: {error}\n")
            return 2
        try:
            os.sched_setaffinity(_pid(server), {cores.measured})
            measures = asyncio.run(
                reserve(
                    server,
                    cores,
                    replicas=options.replicas,
                    proxies=options.proxies,
                    rounds=options.rounds,
                    seconds=options.seconds,
                )
            )
        finally:
            server.kill()
    print(msgspec.json.encode(measures).decode() if options.json else table(measures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
