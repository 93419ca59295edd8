"""What the kernel knows of an engine's processes: sessions, start times, shared memory.

An engine is a tree: vLLM's API server starts an engine core, that starts workers, and each may
outlive its parent. All of them stay in the session that the agent opened for the engine, so the
session is the handle on the tree. A pid alone is not: pids are used again. Pid, start time and
boot together are unique, and a process counts as the engine's only if it carries the engine's
mark in its environment or runs the engine's own executable in the engine's session.
"""

import contextlib
import os
import signal
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

import msgspec

PROC: Final = Path("/proc")
SHM: Final = Path("/dev/shm")  # noqa: S108 - a place to look at, not to create files in
SHM_PREFIXES: Final = ("psm_", "sem.mp-")
"""Shared memory and semaphores as Python's multiprocessing names them."""
RESOURCE_TRACKER: Final = "multiprocessing.resource_tracker"
ESSENTIAL_TITLE: Final = "VLLM::"
"""vLLM names its engine core and its workers so. None of them can be spared."""


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One process as the kernel showed it."""

    pid: int
    started_ticks: int
    """Clock ticks since boot: with the pid, it is unique until the next boot."""
    session: int
    zombie: bool
    command_line: str

    @property
    def is_resource_tracker(self) -> bool:
        """It unlinks its siblings' shared memory once they are gone, and then ends by itself."""
        return RESOURCE_TRACKER in self.command_line

    @property
    def is_essential(self) -> bool:
        """The engine cannot go on without it."""
        return self.command_line.startswith(ESSENTIAL_TITLE)


def boot_id() -> str:
    """Name this boot of the machine."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def look_at(pid: int) -> Process | None:
    """Describe process `pid`, or return None when there is none."""
    try:
        stat = (PROC / str(pid) / "stat").read_text(errors="replace")
        command_line = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return None
    # The second field is the name in parentheses, and may itself hold blanks and parentheses.
    fields = stat[stat.rindex(")") + 2 :].split()
    return Process(
        pid=pid,
        started_ticks=int(fields[19]),
        session=int(fields[3]),
        zombie=fields[0] in {"Z", "X"},
        command_line=command_line.replace(b"\0", b" ").decode(errors="replace").strip(),
    )


def all_pids() -> list[int]:
    """List every process of the machine."""
    return [int(entry.name) for entry in os.scandir(PROC) if entry.name.isdigit()]


def members(session: int) -> list[Process]:
    """List the living processes of `session`."""
    found: list[Process] = []
    for pid in all_pids():
        # getsid is one system call: most processes are passed over without reading a file.
        try:
            if os.getsid(pid) != session:
                continue
        except OSError:
            continue
        process = look_at(pid)
        if process is not None and process.session == session and not process.zombie:
            found.append(process)
    return found


def carries(pid: int, mark: str) -> bool:
    """Tell whether process `pid` was started with `mark` in its environment."""
    try:
        environment = (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return False
    return mark.encode() in environment


def executable(pid: int) -> str:
    """Return the path of the program that `pid` runs; empty when it cannot be read."""
    try:
        return str((PROC / str(pid) / "exe").readlink())
    except OSError:
        return ""


def engine_tree(session: int, mark: str, program: str) -> list[Process]:
    """List the processes of `session` that are the engine's: marked, or running its `program`.

    Processes rename themselves over their environment, hence the second way to know them.
    """
    return [
        process
        for process in members(session)
        if carries(process.pid, mark) or executable(process.pid) == program
    ]


def find_leader(mark: str) -> Process | None:
    """Find the session leader that carries `mark`: an engine whose pid was never written down."""
    for pid in all_pids():
        with contextlib.suppress(OSError):
            if os.getsid(pid) == pid and carries(pid, mark):
                return look_at(pid)
    return None


def kill(processes: Collection[Process], number: signal.Signals) -> None:
    """Send `number` to those of `processes` that are still what they were."""
    for process in processes:
        now = look_at(process.pid)
        if now is not None and now.started_ticks == process.started_ticks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, number)


def shared_memory(pids: Collection[int]) -> frozenset[str]:
    """Name the shared-memory files of engines' kind that processes `pids` have mapped.

    Found by inode: a semaphore is mapped under the temporary name that it was made with.
    """
    inodes = {inode for pid in pids for inode in _mapped(pid)}
    with os.scandir(SHM) as entries:
        return frozenset(
            entry.path
            for entry in entries
            if entry.name.startswith(SHM_PREFIXES) and entry.inode() in inodes
        )


def sweep(files: Collection[str]) -> list[str]:
    """Unlink those of `files` that exist and that no living process has mapped; return them.

    Only names that were seen in an engine's own maps come here: what others made stays.
    """
    left = [path for path in files if Path(path).parent == SHM and Path(path).exists()]
    if not left:
        return []
    used = shared_memory(all_pids())
    swept: list[str] = []
    for path in left:
        if path not in used:
            Path(path).unlink(missing_ok=True)
            swept.append(path)
    return swept


def _mapped(pid: int) -> Iterator[int]:
    try:
        maps = (PROC / str(pid) / "maps").read_text(errors="replace")
    except OSError:
        return
    for line in maps.splitlines():
        if str(SHM) in line:
            yield int(line.split()[4])
