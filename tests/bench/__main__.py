"""`make bench`: what the proxy costs, beside nginx, in interleaved rounds on this machine.

Exit code 0: measured, and every budget kept. 1: a budget missed, or answers failed. 2: cannot run.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import msgspec

from tests.bench.judging import Figure, Run, Verdict, figure, judge, ratio
from tests.bench.machine import BenchError, Cores, cpu_s, memory_bytes
from tests.bench.peers import PROGRAMS, installed
from tests.bench.servers import SERVERS, nginx_program, redis_for
from tests.bench.site import Server, Site
from tests.bench.workloads import WORKLOADS, Pair, Workload, pair
from tests.support.waiting import wait_until

WARM_UP_S: Final = 1.5
YARDSTICK: Final = "nginx"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One workload: everything that was measured, and what it comes to."""

    workload: Workload
    figures: list[Figure]
    verdicts: list[Verdict]
    runs: dict[str, list[Run]]

    @property
    def good(self) -> bool:
        """Tell whether every budget was kept and every answer was good."""
        return all(verdict.kept for verdict in self.verdicts) and not any(
            each.failed for each in self.figures
        )


async def measure(pair: Pair, cores: Cores, workload: Workload, server: Server, number: int) -> Run:
    """Run `workload` on `server` once, and see that nothing is left of it."""
    server_s, replicas_s, core_s = cpu_s(server.pid), cpu_s(pair.pid), cores.busy_s()
    answered = await pair.run(workload, server.port, server.model)
    own_s = cpu_s(server.pid) - server_s
    replicas_s = cpu_s(pair.pid) - replicas_s
    others_s = max(0.0, cores.busy_s() - core_s - own_s)
    units = max(1, answered.units(workload))
    if server.reserved is not None:
        await wait_until(
            lambda: server.reserved is None or server.reserved() == 0,
            what=f"{server.name} has given back every reservation",
        )
    return Run(
        round=number,
        server=server.name,
        answered=answered,
        cpu_us=own_s / units * 1e6,
        pair_us=(answered.cpu_s + replicas_s) / units * 1e6,
        others_share=others_s / answered.seconds,
        memory_bytes=memory_bytes(server.pid),
    )


async def bench(
    workloads: Sequence[Workload], names: Sequence[str], rounds: int, folder: Path
) -> list[Outcome]:
    """Measure each workload on each server, in turns."""
    cores = Cores()
    outcomes: list[Outcome] = []
    async with AsyncExitStack() as stack:
        replicas = await stack.enter_async_context(pair(folder, cores))
        redis = await stack.enter_async_context(redis_for(folder, cores))
        site = Site(cores, replicas.ports, folder, redis)
        servers = [await stack.enter_async_context(SERVERS[name](site)) for name in names]
        for workload in workloads:
            warm_up = msgspec.structs.replace(workload, seconds=min(WARM_UP_S, workload.seconds))
            for server in servers:
                await replicas.run(warm_up, server.port, server.model)
            runs: dict[str, list[Run]] = defaultdict(list)
            for number in range(rounds):
                for server in servers:
                    run = await measure(replicas, cores, workload, server, number)
                    runs[server.name].append(run)
                    print(
                        f"{workload.name} round {number + 1}/{rounds}: {server.name} "
                        f"{run.cpu_us:.1f} µs per {workload.unit}, others had "
                        f"{run.others_share:.0%} of its core",
                        flush=True,
                    )
            figures = [figure(workload, each) for each in runs.values()]
            verdicts = judge(workload, runs)
            outcomes.append(
                Outcome(workload=workload, figures=figures, verdicts=verdicts, runs=dict(runs))
            )
    return outcomes


def table(outcome: Outcome) -> str:
    """Show one workload."""
    workload = outcome.workload
    streams = f"streams of {workload.tokens} tokens" if workload.streamed else "whole answers"
    unit = workload.unit
    lines = [
        f"\n{workload.name}: {workload.users} users, {streams}; medians; times in ms",
        (
            f"{'':18}{'CPU µs/' + unit:>15}{'(least-most)':>16}{'× ' + YARDSTICK:>9}"
            f"{unit + 's/s':>12}{'TTFT p50':>10}{'transit p50/p99':>17}{'gap p99':>9}"
            f"{'MiB':>7}{'pair µs':>9}{'others':>8}{'failed':>8}"
        ),
    ]
    for each in outcome.figures:
        against = "–"
        if YARDSTICK in outcome.runs:
            against = f"{ratio(outcome.runs, each.server, YARDSTICK):.2f}"
        spread = f"({each.cpu_least_us:.1f}-{each.cpu_most_us:.1f})"
        transit = f"{each.transit_p50_ms:.2f}/{each.transit_p99_ms:.2f}"
        lines.append(
            f"{each.server:18}{each.cpu_us:15.1f}{spread:>16}{against:>9}"
            f"{each.per_s:12,.0f}{each.ttft_p50_ms:10.2f}{transit:>17}{each.gap_p99_ms:9.2f}"
            f"{each.memory_mib:7.0f}{each.pair_us:9.1f}{each.others_share:8.0%}{each.failed:8}"
        )
    for verdict in outcome.verdicts:
        word = "kept" if verdict.kept else "MISSED"
        lines.append(
            f"budget {word}: {verdict.budget.says}: × {verdict.ratio:.3f} "
            f"(at most {verdict.budget.ratio:g}; median of the rounds' ratios)"
        )
    return "\n".join(lines)


def chosen(asked: Sequence[str] | None, known: Mapping[str, Any]) -> list[str]:
    """Give what was asked for in the order in which it is known; everything unless asked."""
    return [name for name in known if asked is None or name in asked]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each server has its turn")
    parser.add_argument("--workload", action="append", choices=tuple(WORKLOADS))
    parser.add_argument("--server", action="append", choices=tuple(SERVERS))
    parser.add_argument("--seconds", type=float, help="of each run, instead of the workload's own")
    parser.add_argument("--out", type=Path, default=Path(".state/bench.json"), metavar="FILE")
    given = parser.parse_args(arguments)
    names = chosen(given.server, SERVERS)
    if YARDSTICK in names and nginx_program() is None:
        print("nginx is not installed (apt-get install nginx-light): measuring without it")
        names.remove(YARDSTICK)
    if absent := [name for name in names if name in PROGRAMS and not installed(name)]:
        print(f"not installed: {', '.join(absent)} (make bench-peers): measuring without")
        names = [name for name in names if name not in absent]
    workloads = [WORKLOADS[name] for name in chosen(given.workload, WORKLOADS)]
    if given.seconds:
        workloads = [msgspec.structs.replace(each, seconds=given.seconds) for each in workloads]
    try:
        with tempfile.TemporaryDirectory(prefix="redmesh-bench-") as folder:
            outcomes = asyncio.run(bench(workloads, names, given.rounds, Path(folder)))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(*(table(outcome) for outcome in outcomes), sep="\n")
    print(f"\nload average {os.getloadavg()[0]:.1f} at the end; all figures in {given.out}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_bytes(msgspec.json.format(msgspec.json.encode(outcomes)))
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
