"""The machine that a benchmark runs on: its cores, who burns them, and the compiler.

The proxy under measurement has one core for itself; the load, the replicas and Redis share the
other one. What else ran on the proxy's core is measured too, because it is the noise.
"""

import contextlib
import os
import shutil
import subprocess
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


def cpu_s(pid: int) -> float:
    """Read user plus system time of a process and of all that live below it."""
    total_s = 0.0
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total_s += times.user + times.system
    return total_s


def memory_bytes(pid: int) -> int:
    """Read what a process and all that live below it have in memory."""
    root = psutil.Process(pid)
    return sum(process.memory_info().rss for process in (root, *root.children(recursive=True)))


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
        (compiler, *options, "-o", program, NATIVE / f"{name}.c"),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"{name}.c does not compile:\n{done.stderr}")
    return program
