"""The machine that a benchmark runs on: its cores, who burns them, and the compiler.

The proxy under measurement has one core for itself; the load, the replicas and Redis share the
other one, and Redis has a third where there is one. What else ran on the proxy's core is measured
too, because it is the noise.
"""

import asyncio
import contextlib
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import psutil

NATIVE: Final = Path(__file__).parent / "native"
_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """What keeps a benchmark from being run, in a sentence for a person."""


class Cores:
    """Which core is whose."""

    def __init__(self) -> None:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            raise BenchError("this machine gives us one core: the load would be measured too")
        self.measured, self.others = cores[:2]
        self.redis = cores[2] if len(cores) > 2 else self.others
        self.count = len(cores)

    def keep_off_measured(self) -> None:
        """Keep this process off the measured core."""
        os.sched_setaffinity(0, {self.others})

    def on_measured(self) -> tuple[str, ...]:
        """Give the command that runs a program on the measured core."""
        return ("taskset", "--cpu-list", str(self.measured))

    def on_others(self) -> tuple[str, ...]:
        """Give the command that runs a program on the other core."""
        return ("taskset", "--cpu-list", str(self.others))

    def busy_s(self) -> float:
        """Read for how long the measured core has been busy, whoever kept it so."""
        name = f"cpu{self.measured} "
        line = next(x for x in Path("/proc/stat").read_text().splitlines() if x.startswith(name))
        user, nice, system, _idle, _iowait, irq, softirq, *steal = map(int, line.split()[1:])
        return (user + nice + system + irq + softirq + sum(steal[:1])) * _TICK_S


def tree(pid: int | None) -> list[psutil.Process]:
    """Find a process and all that live below it; nobody for None."""
    if pid is None:
        return []
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def cpu_s(pid: int | None) -> float:
    """Read user plus system time of a process and of all that live below it."""
    total_s = 0.0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total_s += times.user + times.system
    return total_s


def memory_bytes(processes: Sequence[psutil.Process]) -> int:
    """Read what processes have in memory together; what they share counts for each of them."""
    total_bytes = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            total_bytes += process.memory_info().rss
    return total_bytes


def raise_file_limit(wanted: int) -> int:
    """Let us and what we start open `wanted` files, or as many as may be; say how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # above the hard limit: root only
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
            return wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def describe(cores: Cores) -> str:
    """Name the processor, how many of its cores we have, the kernel and the Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    processor = next(names, platform.machine())
    python = platform.python_version()
    return f"{processor}, {cores.count} cores, Linux {platform.release()}, Python {python}"


@asynccontextmanager
async def process(
    *command: str | Path, log: Path | None = None
) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Run a program while the block runs; what it says goes to `log`, else its output to a pipe."""
    with (log or Path(os.devnull)).open("ab") as said:
        started = await asyncio.create_subprocess_exec(
            *command,
            stdout=said if log else asyncio.subprocess.PIPE,
            stderr=said if log else None,
        )
    try:
        yield started
    finally:
        if started.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # a signal to all of us was faster
                started.kill()
            await started.wait()


def build(name: str, folder: Path) -> Path:
    """Compile the program `name` unless `folder` has it.

    Raises BenchError with the remedy or the compiler's words.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise BenchError("no C compiler: `make system` installs one, or apt-get install gcc")
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    if program.exists():
        return program
    options = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror")
    done = subprocess.run(
        (compiler, *options, "-o", program, NATIVE / f"{name}.c", "-lm"),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"{name}.c does not compile:\n{done.stderr}")
    return program
