"""What is asked of a server, and the programs that ask and answer."""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec

from tests.bench.machine import BenchError, Cores, build, process

REPLICAS: Final = 4
DRAIN_S: Final = 30.0
OWN_FILES: Final = 200


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of load.

    Closed loop: each user asks again when it has been answered. Open loop (`rate`): requests come
    at random whatever becomes of those before.
    """

    name: str
    says: str
    """What it is, in a few words for a person; `{users}` stands for their number."""
    unit: str = "token"
    """What CPU time is divided by: `request` or `token`."""
    users: int
    """In an open loop: how many requests may be in flight."""
    tokens: int
    streamed: bool = True
    rate: float = 0.0
    """Requests per second of an open loop."""
    ttft_ms: float = 50.0
    """What a replica takes to the first token, and to each next one."""
    inter_token_ms: float = 20.0
    ramp_s: float = 0.0
    """In a closed loop: the time in which all users have begun."""
    seconds: float
    """Until nobody asks any more; what is in flight then is waited for."""
    rounds: int = 5
    """How often each server has its turn, unless told otherwise."""

    @property
    def files(self) -> int:
        """How many files a proxy has open under this load, with room for its own."""
        return 2 * self.users + OWN_FILES

    def fitting(self, files: int) -> "Workload":
        """Give this load with as many users as `files` open files allow."""
        return msgspec.structs.replace(self, users=min(self.users, (files - OWN_FILES) // 2))

    def times(self, workers: int) -> "Workload":
        """Give each of `workers` this load."""
        return msgspec.structs.replace(self, users=self.users * workers, rate=self.rate * workers)

    def warm_up(self) -> "Workload":
        """Give a short, small load of this kind."""
        return msgspec.structs.replace(
            self,
            users=min(self.users, 64),
            tokens=min(self.tokens, 16),
            rate=0.0,
            inter_token_ms=min(self.inter_token_ms, 20.0),
            ramp_s=0.1 if self.streamed else 0.0,
            seconds=min(self.seconds, 1.0),
        )


_ALL: Final = (
    Workload(
        name="unary",
        says="{users} users, whole answers of one token at once",
        unit="request",
        users=64,
        tokens=1,
        streamed=False,
        seconds=4.0,
    ),
    Workload(
        name="stream",
        says="{users} users, streams of 64 tokens each 20 ms",
        users=200,
        tokens=64,
        ramp_s=1.3,
        seconds=8.0,
    ),
    Workload(
        name="saturate",
        says="{users} users, streams of 64 tokens each 20 ms: more than one core can do",
        users=1000,
        tokens=64,
        ramp_s=1.3,
        seconds=8.0,
    ),
    Workload(
        name="headline",
        says="100 requests/s at random for 60 s, streams of 100 tokens each 100 ms: 1,000 at once",
        users=4000,
        tokens=100,
        rate=100.0,
        inter_token_ms=100.0,
        seconds=60.0,
        rounds=1,
    ),
    Workload(
        name="long",
        says="{users} streams at once, a token each second",
        users=10_000,
        tokens=24,
        inter_token_ms=1000.0,
        ramp_s=10.0,
        seconds=10.5,  # all of them have begun, none has ended
        rounds=1,
    ),
)
WORKLOADS: Final[Mapping[str, Workload]] = {workload.name: workload for workload in _ALL}


class Spread(msgspec.Struct, frozen=True):
    """Two percentiles."""

    p50: float
    p99: float


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """What the load generator says of one run."""

    asked: int
    good: int
    tokens: int
    in_flight: int
    """The most at one time."""
    seconds: float
    cpu_s: float
    """Its own."""
    failed: dict[str, int]
    first_failure: str
    ttft_ms: Spread
    added_ms: Spread
    """Time to the first token less what the replica itself took: both ways through the server."""
    transit_ms: Spread
    """From a token's sending by the replica to its arrival at the client."""
    jitter_ms: Spread
    """By how much the transit of a token differs from that of the token before."""
    gap_ms: Spread
    """Between tokens."""
    whole_ms: Spread

    def units(self, workload: Workload) -> int:
        """Count what CPU time is divided by."""
        return self.tokens if workload.unit == "token" else self.good


class Pair:
    """The load generator, and the replicas that it reaches through a server."""

    def __init__(self, load: Path, cores: Cores, ports: list[int], pid: int) -> None:
        self._load = load
        self._cores = cores
        self.ports = ports
        self.pid = pid
        """Of the replicas."""

    async def run(self, workload: Workload, port: int, model: str) -> Answered:
        """Put `workload` on the server at `port`."""
        options = {
            "port": port,
            "model": model,
            "users": workload.users,
            "rate": workload.rate,
            "tokens": workload.tokens,
            "stream": int(workload.streamed),
            "ttft-ms": workload.ttft_ms,
            "itl-ms": workload.inter_token_ms,
            "ramp-s": workload.ramp_s,
            "seconds": workload.seconds,
            "drain-s": DRAIN_S,
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        async with process(*self._cores.on_others(), self._load, *flags) as running:
            out, _ = await running.communicate()
        if running.returncode:
            raise BenchError(f"the load generator failed with exit code {running.returncode}")
        return msgspec.json.decode(out, type=Answered)


@asynccontextmanager
async def pair(folder: Path, cores: Cores) -> AsyncGenerator[Pair]:
    """Compile both programs in `folder`, and run the replicas while the block runs."""
    load, replicas = build("load", folder), build("replicas", folder)
    command = (*cores.on_others(), replicas, "--count", str(REPLICAS))
    async with process(*command) as running:
        if running.stdout is None:
            raise BenchError("the replicas cannot tell their ports")
        ports: list[int] = json.loads(await running.stdout.readline())
        yield Pair(load, cores, ports, running.pid)
