"""Process trees that behave badly: deaf to SIGTERM, orphaned, with shared memory left behind."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from multiprocessing import shared_memory
from pathlib import Path

import msgspec
import pytest

from services.agent import adoption, proctree
from services.agent.launch import MARK_VARIABLE, Launch
from services.agent.process import EngineProcess, program_of
from services.agent.statefile import EngineFile, EngineFolders
from shared.errors import EngineError
from shared.models.deployment import DeploymentSpec
from shared.models.order import Order, OrderAction
from tests.support.waiting import wait_until

DEAF = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""
TREE = """
import multiprocessing, os, signal, sys, time
from multiprocessing import shared_memory
def worker(name):
    block = shared_memory.SharedMemory(name=name)
    print("worker", os.getpid(), flush=True)
    time.sleep(600)
block = shared_memory.SharedMemory(create=True, size=4096)
context = multiprocessing.get_context("fork")
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
context.Process(target=worker, args=(block.name,)).start()
print("up", flush=True)
time.sleep(600)
"""


class Ground:
    """A state directory, and the engines started in it."""

    def __init__(self, root: Path) -> None:
        self.folders = EngineFolders(root)
        self.started: list[EngineProcess] = []

    def start(self, rid: str, program: str, mark: str = "") -> EngineProcess:
        """Start `program` as the engine of `rid`."""
        mark = mark or f"mark-of-{rid}-{time.monotonic_ns()}"
        launch = Launch(
            command=(sys.executable, "-c", program),
            environment={**os.environ, MARK_VARIABLE: mark},
        )
        file = EngineFile(
            order=Order(
                rid=rid,
                model="m",
                gen=1,
                action=OrderAction.RUN,
                revision="v",
                spec=DeploymentSpec(name="m"),
            ),
            port=1,
            url="u",
            mark=mark,
            boot=proctree.boot_id(),
            program=program_of(launch),
        )
        self.started.append(EngineProcess.start(self.folders, file, launch))
        return self.started[-1]

    async def says(self, rid: str, word: str) -> None:
        """Wait until the engine of `rid` has printed `word`."""
        await wait_until(lambda: word in self.folders.log(rid).read_text())


@pytest.fixture
async def ground(tmp_path: Path) -> AsyncIterator[Ground]:
    """Give a ground that is clean again after the test."""
    ground = Ground(tmp_path)
    yield ground
    for process in ground.started:
        await process.stop(0.0)


async def test_death_is_known_at_once_with_its_kind(ground: Ground) -> None:
    """The end of the main process tells how it ended: exit code or signal."""
    exits = ground.start("a", "raise SystemExit(3)")
    killed = ground.start("b", DEAF)
    async with asyncio.timeout(5):
        assert await exits.wait() == "engine exited with code 3"
        os.kill(killed.file.pid, signal.SIGKILL)
        assert "SIGKILL" in await killed.wait()
    assert not killed.alive


async def test_deaf_engine_is_killed_at_its_deadline(ground: Ground) -> None:
    """An engine that ignores SIGTERM is gone when its grace is over."""
    process = ground.start("a", DEAF)
    await ground.says("a", "up")
    async with asyncio.timeout(10):
        await process.stop(0.2)
    assert proctree.members(process.file.pid) == []


async def test_orphans_and_their_shared_memory_go_with_the_engine(ground: Ground) -> None:
    """After SIGKILL of the main process its children and memory go; that of others stays."""
    other = shared_memory.SharedMemory(create=True, size=4096)
    process = ground.start("a", TREE)
    await ground.says("a", "worker")
    process.note_warm()
    (path,) = process.file.shared_memory
    os.kill(process.file.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        await process.wait()
        assert proctree.members(process.file.pid)
        await process.clean()
    assert proctree.members(process.file.pid) == []
    left = {entry.path for entry in os.scandir(proctree.SHM)}
    assert path not in left
    assert str(proctree.SHM / other.name.lstrip("/")) in left
    other.close()
    other.unlink()


async def test_engine_is_on_disk_before_it_runs(ground: Ground) -> None:
    """An agent that dies between the start and the note of the pid finds the engine by its mark."""
    process = ground.start("a", DEAF)
    await ground.says("a", "up")
    ((file,), _) = ground.folders.read_all()
    found = adoption.find(msgspec.structs.replace(file, pid=0, started_ticks=0))
    assert found is not None
    assert found.pid == process.file.pid


async def test_adopted_engine_is_watched_and_ended_like_an_own_one(ground: Ground) -> None:
    """A second owner sees the death of a process that is not its child."""
    first = ground.start("a", DEAF)
    await ground.says("a", "up")
    found = adoption.find(first.file)
    assert found is not None
    second = EngineProcess.adopt(ground.folders, found)
    assert second.alive
    async with asyncio.timeout(10):
        await second.stop(0.1)
        await first.wait()
    assert adoption.find(first.file) is None


async def test_leftovers_are_the_engines_own_only(ground: Ground) -> None:
    """Processes of the same session without its mark, running another program, are not touched."""
    process = ground.start("a", TREE)
    await ground.says("a", "worker")
    assert len(adoption.leftovers(process.file)) >= 2
    stranger = msgspec.structs.replace(
        process.file, mark="another-mark", program="/another/program"
    )
    assert adoption.leftovers(stranger) == []


async def test_program_that_is_missing_is_an_engine_error(ground: Ground, tmp_path: Path) -> None:
    """A command that cannot be run raises an error with its name, not a traceback."""
    process = ground.start("a", DEAF)
    launch = Launch(command=("/no/such/program",), environment={})
    with pytest.raises(EngineError, match="/no/such/program"):
        EngineProcess.start(ground.folders, process.file, launch)
