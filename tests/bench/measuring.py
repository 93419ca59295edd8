"""Measures workloads on servers: fresh ones for each workload, in turns, round by round."""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple

import psutil

from tests.bench.judging import Run, Runs
from tests.bench.machine import Cores, cpu_s, memory_bytes, tree
from tests.bench.servers import SERVERS, redis_for
from tests.bench.site import Server, Site
from tests.bench.workloads import Pair, Workload, pair
from tests.support.waiting import wait_until

SAMPLE_S: Final = 0.5


class Idle(NamedTuple):
    """A server before the first run of a workload."""

    server: Server
    memory_bytes: int


class Highest:
    """The most memory that some processes had while somebody looked."""

    def __init__(self, processes: Sequence[psutil.Process]) -> None:
        self._processes = processes
        self.memory_bytes = memory_bytes(processes)

    @asynccontextmanager
    async def watched(self) -> AsyncGenerator[None]:
        """Look while the block runs, and once more at its end."""
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            self._look()

    def _look(self) -> None:
        self.memory_bytes = max(self.memory_bytes, memory_bytes(self._processes))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self._look()


async def measure(pair: Pair, cores: Cores, workload: Workload, idle: Idle, number: int) -> Run:
    """Run `workload` on a server once, and see that nothing is left of it."""
    server = idle.server
    highest = Highest(tree(server.pid))
    server_s, replicas_s, core_s = cpu_s(server.pid), cpu_s(pair.pid), cores.busy_s()
    async with highest.watched():
        answered = await pair.run(workload.times(server.workers), server.port, server.model)
    own_s = cpu_s(server.pid) - server_s
    replicas_s = cpu_s(pair.pid) - replicas_s
    others_s = max(0.0, cores.busy_s() - core_s - own_s)
    units = answered.units(workload)
    if server.reserved is not None:
        await wait_until(
            lambda: server.reserved is None or server.reserved() == 0,
            what=f"{server.name} has given back every reservation",
        )
    return Run(
        round=number,
        server=server.name,
        answered=answered,
        cpu_us=own_s / max(1, units) * 1e6,
        pair_us=(answered.cpu_s + replicas_s) / max(1, units) * 1e6,
        per_s=units / answered.seconds,
        others_share=others_s / answered.seconds,
        memory_bytes=highest.memory_bytes,
        idle_bytes=idle.memory_bytes,
    )


async def measure_workload(
    workload: Workload, names: Sequence[str], rounds: int, folder: Path, cores: Cores
) -> Runs:
    """Measure one workload on each server, in turns; the programs are in `folder`."""
    own = folder / workload.name
    own.mkdir()
    async with AsyncExitStack() as stack:
        replicas = await stack.enter_async_context(pair(folder, cores))
        redis = await stack.enter_async_context(redis_for(own, cores))
        site = Site(cores, replicas.ports, own, redis)
        idle: list[Idle] = []
        for name in names:
            server = await stack.enter_async_context(SERVERS[name](site))
            await replicas.run(workload.warm_up(), server.port, server.model)
            idle.append(Idle(server, memory_bytes(tree(server.pid))))
        runs: dict[str, list[Run]] = defaultdict(list)
        for number in range(rounds):
            for each in idle:
                run = await measure(replicas, cores, workload, each, number)
                runs[run.server].append(run)
                print(
                    f"{workload.name} round {number + 1}/{rounds}: {run.server} "
                    f"{run.cpu_us:.1f} µs per {workload.unit}, {run.per_s:,.0f} a second, "
                    f"others had {run.others_share:.0%} of its core"
                    + (f", {run.failed} FAILED" if run.failed else ""),
                    flush=True,
                )
    return dict(runs)
