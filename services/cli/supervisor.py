"""Keeps the processes of one mesh running, and ends them in the right order.

Each child has a process group and a log file of its own, and is started again when it ends,
after 0.2 s, 0.4 s … up to 5 s; one that ran for 10 s begins at 0.2 s again. Stopping goes by
stages: proxies drain first, then controllers go (nobody replaces what stops next), then agents
with their engines, at last Redis. The supervisor knows nothing of models or of Redis: a mesh
whose supervisor hangs or dies goes on serving.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Final

import msgspec
import structlog

_log = structlog.get_logger(__name__)

BACKOFF_S: Final = (0.2, 5.0)
"""First and longest wait before a child that ended is started again."""

STEADY_S: Final = 10.0
"""A child that ran for this long begins with the first wait again."""

HURRIED_STOP_S: Final = 2.0
"""What a child gets to end, at most, once the operator is in a hurry."""


class ChildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How one child is run. Holds no secret: those are in files that the environment names."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    """Added to the supervisor's own environment."""
    log: str
    stage: int
    """Children of a lower stage are stopped, and have ended, before those of a higher one."""
    stop_timeout_s: float = 30.0
    """From SIGTERM to SIGKILL of its process group."""


class _Child:
    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.process: asyncio.subprocess.Process | None = None
        self.stopping = asyncio.Event()
        self.restarts = 0


class Supervisor:
    """Runs `specs` until told to stop. `on_change` gets the pids by name after every change."""

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        on_change: Callable[[dict[str, int]], None],
        *,
        backoff_s: tuple[float, float] = BACKOFF_S,
    ) -> None:
        self._children = [_Child(spec) for spec in specs]
        self._on_change = on_change
        self._backoff_s = backoff_s

    async def run(self, stop: asyncio.Event, hurry: asyncio.Event) -> None:
        """Keep all children running until `stop`; then end them stage by stage.

        `hurry` cuts each child's time to end to `HURRIED_STOP_S`.
        """
        async with asyncio.TaskGroup() as group:
            keepers = {
                child.spec.name: group.create_task(self._keep(child)) for child in self._children
            }
            await stop.wait()
            for stage in sorted({child.spec.stage for child in self._children}):
                await asyncio.gather(
                    *(
                        self._stop(child, keepers[child.spec.name], hurry)
                        for child in self._children
                        if child.spec.stage == stage
                    )
                )

    async def _keep(self, child: _Child) -> None:
        wait_s = self._backoff_s[0]
        while not child.stopping.is_set():
            began_s = time.monotonic()
            code = await self._run_once(child)
            if child.stopping.is_set():
                return
            if time.monotonic() - began_s >= STEADY_S:
                wait_s = self._backoff_s[0]
            child.restarts += 1
            _log.warning(
                "child_ended",
                child=child.spec.name,
                exit_code=code,
                restarts=child.restarts,
                again_in_s=wait_s,
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await child.stopping.wait()
            wait_s = min(wait_s * 2, self._backoff_s[1])

    async def _run_once(self, child: _Child) -> int:
        spec = child.spec
        try:
            with _append(Path(spec.log)) as log:
                child.process = await asyncio.create_subprocess_exec(
                    *spec.argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **spec.env},
                    start_new_session=True,
                )
        except OSError as error:
            _log.error("child_not_started", child=spec.name, error=str(error))
            return 127
        self._changed()
        if child.stopping.is_set():  # told to stop while it was being started
            child.process.terminate()
        code = await child.process.wait()
        child.process = None
        self._changed()
        return code

    async def _stop(self, child: _Child, keeper: asyncio.Task[None], hurry: asyncio.Event) -> None:
        child.stopping.set()
        if child.process is not None:
            with contextlib.suppress(ProcessLookupError):
                child.process.terminate()
        await _ended(keeper, hurry, child.spec.stop_timeout_s)
        if child.process is not None:
            _log.warning("child_killed", child=child.spec.name)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
        await keeper

    def _changed(self) -> None:
        pids = {child.spec.name: child.process.pid for child in self._children if child.process}
        try:
            self._on_change(pids)
        except OSError as error:
            # A full disk must not end the supervisor: its children would be orphans.
            _log.error("children_not_recorded", error=str(error))


async def _ended(keeper: asyncio.Task[None], hurry: asyncio.Event, timeout_s: float) -> None:
    """Wait for `keeper` up to `timeout_s`, or for `HURRIED_STOP_S` after `hurry` is set."""
    hurried = asyncio.ensure_future(hurry.wait())
    try:
        await asyncio.wait(
            {keeper, hurried}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if hurried.done() and not keeper.done():
            await asyncio.wait({keeper}, timeout=min(timeout_s, HURRIED_STOP_S))
    finally:
        hurried.cancel()


def _append(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")
