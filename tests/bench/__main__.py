"""`make bench`: what the proxy costs, beside nginx and other routers, in interleaved rounds.

Exit code 0: measured, every budget kept and nothing dearer than the baseline. 1: a budget missed,
or dearer. 2: cannot run.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from tests.bench.baseline import Baseline, renewed
from tests.bench.judging import YARDSTICK, Measure
from tests.bench.ledger import measure_ledger
from tests.bench.machine import BenchError, Cores, describe, raise_file_limit
from tests.bench.measuring import measure_workload
from tests.bench.peers import PROGRAMS, installed
from tests.bench.plot import cost_charts, measure_charts, svg
from tests.bench.report import Judged, Outcome, conclude
from tests.bench.servers import SERVERS, USUAL, nginx_program
from tests.bench.workloads import WORKLOADS, Workload

BASELINE: Final = Path(__file__).with_name("baseline.json")
PLOTS: Final = Path("docs/performance")

NOT_HTTP: Final[Mapping[str, Callable[[Path, Cores, int | None], Awaitable[Judged]]]] = {
    "reserve": measure_ledger
}
"""Workloads that ask no server over HTTP, by name: each has a folder of its own, and the rounds
that were asked for. They come after the others."""


def chosen(asked: Sequence[str] | None, known: Mapping[str, Any]) -> list[str]:
    """Give what was asked for in the order in which it is known; everything unless asked."""
    return [name for name in known if asked is None or name in asked]


def servers(asked: Sequence[str] | None) -> list[str]:
    """Give the servers to measure, and say which of them cannot be."""
    names = chosen(asked or USUAL, SERVERS)
    if YARDSTICK in names and nginx_program() is None:
        print("nginx is not installed (apt-get install nginx-light): measuring without it")
        names.remove(YARDSTICK)
    if absent := [name for name in names if name in PROGRAMS and not installed(name)]:
        print(f"not installed: {', '.join(absent)} (make bench-peers): measuring without")
    return [name for name in names if name not in absent]


def workloads(asked: Sequence[str] | None, seconds: float | None) -> list[Workload]:
    """Give the workloads to run, and say which of them this machine allows in part only."""
    wanted = [WORKLOADS[name] for name in chosen(asked, WORKLOADS)]
    files = raise_file_limit(max((each.files for each in wanted), default=0))
    able = [each.fitting(files) for each in wanted]
    for each, whole in zip(able, wanted, strict=True):
        if each != whole:
            print(
                f"{each.name}: {each.users:,} at once instead of {whole.users:,}: a proxy has two "
                f"open files for each, and {files:,} are allowed (ulimit -Hn {whole.files})"
            )
    if seconds is None:
        return able
    return [msgspec.structs.replace(each, seconds=seconds) for each in able]


def read_baseline(path: Path) -> Baseline:
    """Read the committed baseline; nothing if there is none.

    Raises BenchError if it cannot be read.
    """
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=Baseline)
    except msgspec.DecodeError as error:
        raise BenchError(f"{path}: {error}; --write-baseline makes it anew") from None


def write_baseline(path: Path, old: Baseline, outcomes: Sequence[Outcome], cores: Cores) -> None:
    """Renew the baseline where there were rounds enough beside nginx."""
    taken = f"{datetime.now(UTC):%Y-%m-%d}, {describe(cores)}"
    new = renewed(old, taken, {each.workload.name: each.ratios for each in outcomes})
    path.write_bytes(msgspec.json.format(msgspec.json.encode(new)) + b"\n")
    print(f"baseline written to {path}")


def write_plots(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Draw what the documentation shows, of the workloads that were measured."""
    runs = {each.workload.name: each.runs for each in outcomes}
    added = (Measure.ADDED_P50, Measure.ADDED_P99)
    drawn = {
        "cpu.svg": cost_charts(runs),
        "latency.svg": measure_charts(runs, added, ("stream", "headline")),
        "tokens.svg": measure_charts(runs, (Measure.RATE,), ("saturate",)),
        "memory.svg": measure_charts(runs, (Measure.STREAM_KB,), ("long",)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, charts in drawn.items():
        if charts:
            (folder / name).write_text(svg(charts))
            print(f"drawn: {folder / name}")


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, help="how often each server has its turn")
    parser.add_argument("--workload", action="append", choices=(*WORKLOADS, *NOT_HTTP))
    parser.add_argument("--server", action="append", choices=tuple(SERVERS))
    parser.add_argument("--seconds", type=float, help="of each run, instead of the workload's own")
    parser.add_argument("--out", type=Path, default=Path(".state/bench.json"), metavar="FILE")
    parser.add_argument(
        "--plot", type=Path, nargs="?", const=PLOTS, metavar="FOLDER", help=f"draw into {PLOTS}"
    )
    parser.add_argument(
        "--write-baseline", action="store_true", help="take this run as the baseline"
    )
    return parser.parse_args(arguments)


class Plan(NamedTuple):
    """What to measure, and what with."""

    workloads: Sequence[Workload]
    servers: Sequence[str]
    not_http: Sequence[str]
    rounds: int | None
    baseline: Baseline
    cores: Cores


async def bench(plan: Plan, folder: Path) -> list[Judged]:
    """Measure each workload on each server, then those that need none; the programs in `folder`."""
    if task := asyncio.current_task():  # so that what was started is stopped
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    outcomes: list[Judged] = []
    for each in plan.workloads:
        rounds = plan.rounds or each.rounds
        runs = await measure_workload(each, plan.servers, rounds, folder, plan.cores)
        outcomes.append(conclude(each, runs, plan.baseline))
        print(outcomes[-1].text(), flush=True)
    for name in plan.not_http:
        own = folder / name
        own.mkdir()
        outcomes.append(await NOT_HTTP[name](own, plan.cores, plan.rounds))
        print(outcomes[-1].text(), flush=True)
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    given = options(arguments)
    try:
        cores = Cores()
        plan = Plan(
            workloads=workloads(given.workload, given.seconds),
            servers=servers(given.server),
            not_http=chosen(given.workload, NOT_HTTP),
            rounds=given.rounds,
            baseline=read_baseline(BASELINE),
            cores=cores,
        )
        cores.keep_off_measured()
        with tempfile.TemporaryDirectory(prefix="redmesh-bench-") as folder:
            outcomes = asyncio.run(bench(plan, Path(folder)))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("bench: interrupted: nothing is written", file=sys.stderr)
        return 2
    print(f"\n{describe(cores)}; load average {os.getloadavg()[0]:.1f} at the end")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_bytes(msgspec.json.format(msgspec.json.encode(outcomes)))
    print(f"all figures in {given.out}")
    over_http = [each for each in outcomes if isinstance(each, Outcome)]
    if given.plot:
        write_plots(given.plot, over_http)
    if given.write_baseline:
        write_baseline(BASELINE, plan.baseline, over_http, cores)
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
