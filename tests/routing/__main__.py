"""`python -m tests.routing`: compare routing policies on request traces, in virtual time.

For each trace the fleet's capacity is measured first (all requests at once, under per-proxy least
connections); then time between arrivals is stretched so that the trace offers the wanted share of
it, and every policy gets the same requests at the same times. Nothing depends on the machine's
speed. Exit code 1: the default policy no longer keeps what `judging` asks of it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from random import Random
from typing import Final

import msgspec
from msgspec.structs import replace

from tests.routing.contenders import contenders
from tests.routing.fleet import host
from tests.routing.judging import REFERENCE, faults
from tests.routing.plot import drawn
from tests.routing.report import Result, table
from tests.routing.run import Outcome, Scenario, simulate, speeds_of
from tests.routing.traces import SAMPLE, Arrival, load, rate_per_s, steady

AT_ONCE: Final = 1e-6


def requests_of(path: Path, *, recorded: bool) -> list[Arrival]:
    """Read a trace; of Azure's, whose minutes differ tenfold, what arrives but not when.

    Driven at a share of the fleet's capacity on average, such a trace overloads it for minutes, and
    then no policy is better than another.
    """
    arrivals = load(path)
    return arrivals if recorded or path.suffix != ".csv" else steady(arrivals, Random(1))


def one(arrivals: list[Arrival], scenario: Scenario, name: str) -> Outcome:
    """Run one policy, in a process of its own."""
    return simulate(arrivals, scenario, contenders()[name], host())


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print a table for each trace, and judge."""
    given = _parser().parse_args(argv)
    names = [name for name in contenders() if not given.policy or name in given.policy]
    speeds = speeds_of(given.replicas)
    results: list[Result] = []
    with ProcessPoolExecutor(max_workers=given.workers) as pool:
        for path in given.trace:
            arrivals = requests_of(path, recorded=given.recorded)
            scenario = Scenario(
                speeds=speeds,
                proxies=given.proxies,
                speeds_known=not given.unknown_speeds,
                seed=given.seed,
            )
            burst = replace(scenario, stretch=AT_ONCE)
            capacity_per_s = pool.submit(one, arrivals, burst, REFERENCE).result().rate_per_s
            wanted_per_s = capacity_per_s * given.utilization
            scenario = replace(scenario, stretch=rate_per_s(arrivals) / wanted_per_s)
            runs: dict[str, Future[Outcome]] = {
                name: pool.submit(one, arrivals, scenario, name) for name in names
            }
            outcomes: dict[str, Outcome] = {}
            for name, run in runs.items():
                outcomes[name] = run.result()
                print(f"{path.name}: {name} is done", file=sys.stderr, flush=True)
            result = Result(
                trace=path.name,
                utilization=given.utilization,
                capacity_per_s=capacity_per_s,
                scenario=scenario,
                outcomes=outcomes,
            )
            results.append(result)
            print(table(result), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2))
    given.out.with_suffix(".svg").write_text(drawn(results))
    print(f"figures: {given.out}, plot: {given.out.with_suffix('.svg')}")
    missed = [fault for result in results for fault in faults(result)]
    for fault in missed:
        print(f"MISSED: {fault}")
    return 1 if missed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.routing", description="Compare routing policies on request traces."
    )
    parser.add_argument(
        "trace",
        nargs="*",
        type=Path,
        default=[SAMPLE],
        help="Mooncake's JSON lines or Azure's CSV; default: the sample that ships",
    )
    parser.add_argument("--utilization", type=float, default=0.8, help="offered share of capacity")
    parser.add_argument("--proxies", type=int, default=4)
    parser.add_argument(
        "--replicas", type=int, default=16, help="a quarter half as fast, a quarter twice as fast"
    )
    parser.add_argument(
        "--unknown-speeds", action="store_true", help="no record says how fast a replica is"
    )
    parser.add_argument(
        "--recorded", action="store_true", help="keep the arrival times of a CSV, bursts and all"
    )
    parser.add_argument("--policy", action="append", help="only this one; may be given again")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(".state/routing.json"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
