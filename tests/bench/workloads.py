"""What is asked of a server, and the programs that ask and answer."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec

from tests.bench.machine import BenchError, Cores, build

REPLICAS: Final = 4
TTFT_MS: Final = 50.0
INTER_TOKEN_MS: Final = 20.0
DRAIN_S: Final = 30.0


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of load. Closed loop: each user asks again when it has been answered."""

    name: str
    unit: str
    """What CPU time is divided by: `request` or `token`."""
    users: int
    tokens: int
    streamed: bool
    ramp_s: float
    seconds: float
    """Until no user asks any more; what is in flight then is waited for."""


WORKLOADS: Final[Mapping[str, Workload]] = {
    workload.name: workload
    for workload in (
        Workload(
            name="unary",
            unit="request",
            users=64,
            tokens=1,
            streamed=False,
            ramp_s=0.0,
            seconds=4.0,
        ),
        Workload(
            name="stream",
            unit="token",
            users=200,
            tokens=64,
            streamed=True,
            ramp_s=1.3,
            seconds=8.0,
        ),
        Workload(
            name="saturate",
            unit="token",
            users=1000,
            tokens=64,
            streamed=True,
            ramp_s=1.3,
            seconds=8.0,
        ),
    )
}


class Spread(msgspec.Struct, frozen=True):
    """Two percentiles."""

    p50: float
    p99: float


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """What the load generator says of one run."""

    asked: int
    good: int
    tokens: int
    seconds: float
    cpu_s: float
    """Its own."""
    failed: dict[str, int]
    first_failure: str
    ttft_ms: Spread
    transit_ms: Spread
    """From a token's sending by the replica to its reading by the client."""
    gap_ms: Spread
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
            "tokens": workload.tokens,
            "stream": int(workload.streamed),
            "ramp-s": workload.ramp_s,
            "seconds": workload.seconds,
            "drain-s": DRAIN_S,
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        process = await asyncio.create_subprocess_exec(
            *self._cores.on_others(), self._load, *flags, stdout=asyncio.subprocess.PIPE
        )
        try:
            out, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise BenchError(f"the load generator failed with exit code {process.returncode}")
        return msgspec.json.decode(out, type=Answered)


@asynccontextmanager
async def pair(folder: Path, cores: Cores) -> AsyncGenerator[Pair]:
    """Compile both programs in `folder`, and run the replicas while the block runs."""
    load, replicas = build("load", folder), build("replicas", folder)
    process = await asyncio.create_subprocess_exec(
        *(*cores.on_others(), replicas, "--count", str(REPLICAS)),
        *("--ttft-ms", str(TTFT_MS), "--itl-ms", str(INTER_TOKEN_MS)),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        if process.stdout is None:
            raise BenchError("the replicas cannot tell their ports")
        ports: list[int] = json.loads(await process.stdout.readline())
        yield Pair(load, cores, ports, process.pid)
    finally:
        process.kill()
        await process.wait()
