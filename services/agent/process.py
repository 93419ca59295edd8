"""One engine's process tree: started in a session of its own, watched, stopped, cleaned up.

Death is seen by pidfd, at once and alike for children and for adopted processes, which belong to
init. The death of vLLM's engine core or of a worker is the engine's death, even while the API
server still answers: it is reported before the rest is cleaned up.

Nothing here ends an engine because the agent ends: engines outlive the agent.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

import msgspec
import structlog

from services.agent import proctree
from services.agent.launch import Launch
from services.agent.proctree import Process
from services.agent.statefile import EngineFile, EngineFolders
from shared.errors import EngineError

_log = structlog.get_logger(__name__)

LAST_ANSWERS_S: Final = 3.0
"""How long an API server whose core died may take to tell its clients so."""
TRACKER_S: Final = 2.0
"""How long a resource tracker may take to unlink shared memory after its siblings' end."""
KILLED_S: Final = 10.0
"""How long SIGKILL may take: a process in an uninterruptible wait ends late."""
POLL_S: Final = 0.05
EXITED: Final = "exited with code"


class EngineProcess:
    """The processes of one engine. Make it by `start` or `adopt`; `wait` tells of its end."""

    def __init__(
        self, folders: EngineFolders, file: EngineFile, child: subprocess.Popen[bytes] | None
    ) -> None:
        self._folders = folders
        self._file = file
        self._child = child
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._main_fd = -1
        self._main_gone = asyncio.Event()
        self._watched: dict[int, int] = {}
        """pid → pidfd of the essential processes besides the main one."""
        self._shared_memory = set(file.shared_memory)

    @classmethod
    def start(cls, folders: EngineFolders, file: EngineFile, launch: Launch) -> Self:
        """Start the engine of `file`; its state file is on disk before its first instruction.

        Raises `EngineError` when the program cannot be started.
        """
        try:
            folders.write(file)
            log = folders.open_log(file.order.rid)
        except OSError as error:
            raise EngineError(f"the state directory cannot be written: {error}") from error
        try:
            # vLLM would import from the folder it is started in: it gets one without modules.
            child = subprocess.Popen(
                launch.command,
                env=launch.environment,
                cwd=folders.folder(file.order.rid),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            raise EngineError(
                f"the engine cannot be started: {launch.command[0]}: {error.strerror}"
            ) from error
        finally:
            os.close(log)
        seen = proctree.look_at(child.pid)
        if seen is None:
            raise EngineError("the engine ended while it was being started")
        file = msgspec.structs.replace(file, pid=child.pid, started_ticks=seen.started_ticks)
        process = cls(folders, file, child)
        # If this fails the engine runs on: a restarted agent finds it by its mark.
        process._write()
        process._watch_main()
        return process

    @classmethod
    def adopt(cls, folders: EngineFolders, file: EngineFile) -> Self:
        """Take over the running engine of `file`, whose identity the caller has checked."""
        process = cls(folders, file, None)
        process._watch_main()
        process.look_around()
        return process

    @property
    def file(self) -> EngineFile:
        """What the state file holds now."""
        return self._file

    @property
    def alive(self) -> bool:
        """No essential process has ended yet."""
        return not self._death.done()

    async def wait(self) -> str:
        """Wait until an essential process ends; return what ended, and how, for a person."""
        return await asyncio.shield(self._death)

    def note_warm(self) -> None:
        """Record that the engine has answered its warm-up."""
        self.look_around()
        self._write(warm=True)

    def look_around(self) -> None:
        """Watch processes of the tree that are new, and note the shared memory that it uses."""
        if self._main_gone.is_set():
            return
        tree = self._tree()
        for process in tree:
            if process.is_essential and process.pid not in self._watched:
                self._watch(process)
        shared = proctree.shared_memory([process.pid for process in tree])
        if not shared <= self._shared_memory:
            self._shared_memory |= shared
            self._write(shared_memory=tuple(sorted(self._shared_memory)))

    async def stop(self, grace_s: float) -> None:
        """End the engine: SIGTERM, `grace_s` seconds to finish what is in flight, then SIGKILL."""
        self.look_around()
        if not self._main_gone.is_set():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._main_fd, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._main_gone.wait()
        await self.clean(patience_s=0.0)

    async def clean(self, *, patience_s: float = LAST_ANSWERS_S) -> None:
        """End what is left of the tree and remove its shared memory.

        A main process that lives gets `patience_s` seconds to end by itself.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._main_gone.wait()
        await end_tree(self._tree, self._shared_memory)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILLED_S):
                await self._main_gone.wait()
        self.release()

    def release(self) -> None:
        """Let go of the engine without touching it: nothing is watched any more."""
        loop = asyncio.get_running_loop()
        for fd in (self._main_fd, *self._watched.values()):
            if fd >= 0:
                loop.remove_reader(fd)
                os.close(fd)
        self._main_fd = -1
        self._watched = dict.fromkeys(self._watched, -1)

    def _tree(self) -> list[Process]:
        return proctree.engine_tree(self._file.pid, self._file.mark, self._file.program)

    def _write(self, *, warm: bool | None = None, shared_memory: tuple[str, ...] = ()) -> None:
        self._file = msgspec.structs.replace(
            self._file,
            warm=self._file.warm if warm is None else warm,
            shared_memory=shared_memory or self._file.shared_memory,
        )
        try:
            self._folders.write(self._file)
        except OSError as error:
            # The engine runs on; a restarted agent would see it as it was when last written.
            _log.warning("state_file_not_written", rid=self._file.order.rid, error=str(error))

    def _watch_main(self) -> None:
        try:
            self._main_fd = os.pidfd_open(self._file.pid)
        except ProcessLookupError:
            self._main_ended()
            return
        asyncio.get_running_loop().add_reader(self._main_fd, self._main_ended)

    def _watch(self, process: Process) -> None:
        try:
            fd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return
        self._watched[process.pid] = fd
        asyncio.get_running_loop().add_reader(fd, self._member_ended, process)

    def _main_ended(self) -> None:
        if self._main_fd >= 0:
            asyncio.get_running_loop().remove_reader(self._main_fd)
            os.close(self._main_fd)
            self._main_fd = -1
        self._main_gone.set()
        code = self._child.poll() if self._child is not None else None
        self._report(f"engine {_how(code)}")

    def _member_ended(self, process: Process) -> None:
        fd = self._watched[process.pid]
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        self._watched[process.pid] = -1
        self._report(f"{process.command_line} (pid {process.pid}) ended under a running API server")

    def _report(self, what: str) -> None:
        if not self._death.done():
            self._death.set_result(what)


async def end_tree(tree: Callable[[], list[Process]], shared_memory: set[str]) -> None:
    """Kill all processes that `tree` lists, and remove `shared_memory` and what they had mapped.

    Resource trackers go last: they unlink what their siblings leave behind.
    """
    found = tree()
    shared_memory |= proctree.shared_memory([process.pid for process in found])
    proctree.kill([p for p in found if not p.is_resource_tracker], signal.SIGKILL)
    await _gone(tree, KILLED_S, trackers=False)
    await _gone(tree, TRACKER_S, trackers=True)
    proctree.kill(tree(), signal.SIGKILL)
    await _gone(tree, KILLED_S, trackers=True)
    swept = await asyncio.to_thread(proctree.sweep, shared_memory)
    if swept:
        _log.info("shared_memory_swept", files=swept)


async def _gone(tree: Callable[[], list[Process]], deadline_s: float, *, trackers: bool) -> None:
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        if not [p for p in tree() if trackers or not p.is_resource_tracker]:
            return
        await asyncio.sleep(POLL_S)


def _how(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL (by somebody, or by the kernel for want of memory)"
    if code is None:
        return "ended (its exit status went to another parent)"
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"{EXITED} {code}"


def program_of(launch: Launch) -> str:
    """Return the real path of the executable that `launch` starts."""
    return str(Path(launch.command[0]).resolve())
