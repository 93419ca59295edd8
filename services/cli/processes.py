"""Processes by pid *and* start time: a pid alone may belong to a stranger by now.

Everything that a mesh starts carries the mesh's id in its environment, and so do the engines that
its agents start. That mark finds what a killed supervisor left behind, and nothing else.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
import psutil

MARK: Final = "MESH_OF_REDMESH_UP"
"""Environment variable that marks the processes of one mesh.

Not one of `REDMESH_*`: agents keep those, which are their own settings, from the engines.
"""

_CLOCK_SLACK_S: Final = 2.0
"""Start times are computed from the boot time, which moves a little when the clock is set."""


class ProcessRef(msgspec.Struct, frozen=True):
    """One process, for good."""

    pid: int
    started_s: float
    """Seconds since the epoch."""


def reference(pid: int) -> ProcessRef | None:
    """Describe the process that runs as `pid` now; None if there is none."""
    try:
        return ProcessRef(pid, psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def alive(ref: ProcessRef | None) -> bool:
    """Tell whether the very process still runs; an ended one that nobody awaited does not."""
    if ref is None:
        return False
    try:
        process = psutil.Process(ref.pid)
        return (
            abs(process.create_time() - ref.started_s) < _CLOCK_SLACK_S
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.Error:
        return False


def marked(mesh_id: str) -> list[ProcessRef]:
    """Find every process of this user that carries the mark of `mesh_id`, except ourselves."""
    found: list[ProcessRef] = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mesh_id:
                found.append(ProcessRef(process.pid, process.create_time()))
    return found


def send(refs: Iterable[ProcessRef], number: signal.Signals) -> None:
    """Send a signal to those of `refs` that still run."""
    for ref in refs:
        if alive(ref):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(ref.pid, number)


def wait_gone(refs: Sequence[ProcessRef], timeout_s: float) -> list[ProcessRef]:
    """Wait until none of `refs` runs; return those that still do after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    left = [ref for ref in refs if alive(ref)]
    while left and time.monotonic() < deadline_s:
        time.sleep(0.05)
        left = [ref for ref in left if alive(ref)]
    return left


def sweep(mesh_id: str, *, grace_s: float) -> int:
    """End everything that carries the mark: SIGTERM, `grace_s` seconds, SIGKILL. Return the count.

    The last resort after the orderly stop; looks twice, since a process may have started another.
    """
    count = 0
    for _ in range(2):
        refs = marked(mesh_id)
        count += len(refs)
        send(refs, signal.SIGTERM)
        left = wait_gone(refs, grace_s)
        send(left, signal.SIGKILL)
        wait_gone(left, 2.0)
    return count
