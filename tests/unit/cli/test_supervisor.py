import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.cli import processes
from services.cli.supervisor import ChildSpec, Supervisor
from tests.support.waiting import wait_until

OBEDIENT = "import signal, time; print('begun', flush=True); signal.pause()"
"""Ends at SIGTERM."""

STUBBORN = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('begun', flush=True)\nwhile True: signal.pause()"
)

SLOW_TO_END = """
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path(sys.argv[1]).write_text(str(time.monotonic()))
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print('begun', flush=True)
signal.pause()
"""


def _child(
    folder: Path,
    name: str,
    code: str,
    *argv: str,
    stage: int = 1,
    stop_timeout_s: float = 10.0,
    env: dict[str, str] | None = None,
) -> ChildSpec:
    return ChildSpec(
        name=name,
        argv=(sys.executable, "-c", code, *argv),
        log=str(folder / f"{name}.log"),
        env=env or {},
        stage=stage,
        stop_timeout_s=stop_timeout_s,
    )


class Running:
    """A supervisor at work, and what it last said of its children."""

    def __init__(self) -> None:
        self.pids: dict[str, int] = {}
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def record(self, pids: dict[str, int]) -> None:
        """Keep what the supervisor says."""
        self.pids = pids


@asynccontextmanager
async def _supervised(*specs: ChildSpec) -> AsyncGenerator[Running]:
    running = Running()
    supervisor = Supervisor(specs, running.record, backoff_s=(0.01, 0.05))
    running.task = asyncio.ensure_future(supervisor.run(running.stop, running.hurry))
    try:
        yield running
    finally:
        running.stop.set()
        running.hurry.set()
        await asyncio.wait_for(running.task, 10)


def _begun(folder: Path, name: str) -> Callable[[], bool]:
    log = folder / f"{name}.log"
    return lambda: log.exists() and "begun" in log.read_text()


async def test_a_child_that_ends_is_started_again(tmp_path: Path) -> None:
    """A child that is killed is started again, with its output in the same log."""
    async with _supervised(_child(tmp_path, "a", OBEDIENT)) as running:
        await wait_until(lambda: _begun(tmp_path, "a")() and "a" in running.pids)
        first = running.pids["a"]
        os.kill(first, signal.SIGKILL)
        await wait_until(lambda: running.pids.get("a", first) != first)
        await wait_until(lambda: (tmp_path / "a.log").read_text().count("begun") == 2)


async def test_a_crash_loop_is_slowed_down(tmp_path: Path) -> None:
    """A child that ends at once is started again ever later, up to the longest wait."""
    async with _supervised(_child(tmp_path, "a", "print('begun', flush=True)")) as running:
        await wait_until(lambda: "begun" in _read(tmp_path / "a.log"))
        await wait_until(lambda: _read(tmp_path / "a.log").count("begun") >= 3)
        assert running.task is not None
        assert not running.task.done()


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


async def test_a_program_that_does_not_exist_does_not_end_the_supervisor(tmp_path: Path) -> None:
    """One child that cannot be started leaves the others running."""
    missing = ChildSpec(
        name="b", argv=("/no/such/program",), env={}, log=str(tmp_path / "b.log"), stage=1
    )
    async with _supervised(missing, _child(tmp_path, "a", OBEDIENT)) as running:
        await wait_until(_begun(tmp_path, "a"))
        assert set(running.pids) == {"a"}


async def test_stages_end_one_after_the_other(tmp_path: Path) -> None:
    """A child of a later stage gets its SIGTERM only when all of earlier stages have ended."""
    names = {"late": 9, "early": 1, "middle": 2}
    specs = [
        _child(tmp_path, name, SLOW_TO_END, str(tmp_path / f"{name}.end"), stage=stage)
        for name, stage in names.items()
    ]
    async with _supervised(*specs) as running:
        for name in names:
            await wait_until(_begun(tmp_path, name))
        running.stop.set()
        assert running.task is not None
        await asyncio.wait_for(running.task, 10)
    ends = [float((tmp_path / f"{name}.end").read_text()) for name in ("early", "middle", "late")]
    assert ends == sorted(ends)


async def test_a_child_that_ignores_sigterm_is_killed_at_its_deadline(tmp_path: Path) -> None:
    """SIGKILL follows SIGTERM after the child's own stop timeout."""
    async with _supervised(_child(tmp_path, "a", STUBBORN, stop_timeout_s=0.2)) as running:
        await wait_until(_begun(tmp_path, "a"))
        ref = processes.reference(running.pids["a"])
        running.stop.set()
        await wait_until(lambda: not processes.alive(ref))


async def test_a_hurry_cuts_the_deadline_short(tmp_path: Path) -> None:
    """Once in a hurry, a child has 2 s at most, whatever its stop timeout is."""
    async with _supervised(_child(tmp_path, "a", STUBBORN, stop_timeout_s=600.0)) as running:
        await wait_until(_begun(tmp_path, "a"))
        running.stop.set()
        running.hurry.set()
        assert running.task is not None
        await asyncio.wait_for(running.task, 10)


async def test_each_child_has_its_own_process_group(tmp_path: Path) -> None:
    """Ctrl-C in the terminal, which goes to a process group, does not reach the children."""
    async with _supervised(_child(tmp_path, "a", OBEDIENT)) as running:
        await wait_until(lambda: "a" in running.pids)
        assert os.getpgid(running.pids["a"]) == running.pids["a"] != os.getpgid(0)


async def test_a_mark_finds_what_a_killed_supervisor_left(tmp_path: Path) -> None:
    """A process is found by the mark in its environment, and ended; others are left alone."""
    marked = _child(tmp_path, "a", OBEDIENT, env={processes.MARK: "mesh-of-this-test"})
    other = _child(tmp_path, "b", OBEDIENT, env={processes.MARK: "another-mesh"})
    async with _supervised(marked, other) as running:
        await wait_until(_begun(tmp_path, "a"))
        await wait_until(_begun(tmp_path, "b"))
        refs = await asyncio.to_thread(processes.marked, "mesh-of-this-test")
        assert [ref.pid for ref in refs] == [running.pids["a"]]


def test_a_pid_of_another_start_is_not_the_process() -> None:
    """A pid that was given to another process since is not taken for the one that was recorded."""
    ref = processes.reference(os.getpid())
    assert ref is not None
    assert processes.alive(ref)
    assert not processes.alive(processes.ProcessRef(ref.pid, ref.started_s - 100))
    assert not processes.alive(None)


@pytest.mark.parametrize("grace_s", [0.2])
async def test_a_sweep_ends_even_what_ignores_sigterm(tmp_path: Path, grace_s: float) -> None:
    """A sweep kills what does not end within its grace."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        STUBBORN,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, processes.MARK: "mesh-to-sweep"},
    )
    assert process.stdout is not None
    await asyncio.wait_for(process.stdout.readline(), 10)
    count = await asyncio.to_thread(processes.sweep, "mesh-to-sweep", grace_s=grace_s)
    assert count == 1
    assert await asyncio.wait_for(process.wait(), 5) == -signal.SIGKILL
