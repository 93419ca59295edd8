"""How a service lives and ends: named background loops with one owner, and signals as an event.

No task is without an owner: `Loops` starts them, restarts none silently, and on leaving cancels
and awaits all of them. A loop that raises an unexpected error brings the service down: a half-dead
service is worse than one that its supervisor restarts.
"""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Final, Self

import structlog

CANCEL_AGAIN_S: Final = 0.5
"""How long a cancelled loop gets to end before it is cancelled again."""

_log = structlog.get_logger(__name__)


class Loops:
    """Background tasks of one service, owned together. Use as an async context manager."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], str] = {}
        self._failure: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        self._failure = asyncio.get_running_loop().create_future()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        # A library may swallow one cancellation: before Python 3.12, asyncio.wait_for does so
        # when what it waits for is just done. So whoever goes on is told again.
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=CANCEL_AGAIN_S)
        if self._failure is not None and self._failure.done():
            self._failure.exception()

    def start(self, name: str, body: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `body` in the background until it ends or the owner leaves."""
        task = asyncio.get_running_loop().create_task(body, name=name)
        self._tasks[task] = name
        task.add_done_callback(self._ended)
        return task

    async def failed(self) -> None:
        """Wait until a loop fails, and raise its error."""
        if self._failure is None:
            message = "Loops must be entered before use"
            raise RuntimeError(message)
        await asyncio.shield(self._failure)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        name = self._tasks.pop(task, "?")
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        _log.error("loop_failed", loop=name, exc_info=error)
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)


async def every(
    interval_s: Callable[[], float],
    act: Callable[[], Awaitable[None]],
    *,
    wake: asyncio.Event | None = None,
) -> None:
    """Call `act`, wait `interval_s()` seconds, and again, for ever; `wake` cuts a wait short."""
    while True:
        await act()
        if wake is None:
            await asyncio.sleep(interval_s())
            continue
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(interval_s()):
                await wake.wait()
        wake.clear()


@contextlib.contextmanager
def stop_signals() -> Generator[asyncio.Event]:
    """Yield an event that SIGTERM or SIGINT sets; restores nothing, for use once per process."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def run_until_stopped(stop: asyncio.Event, loops: Loops) -> None:
    """Return when `stop` is set; raise if one of `loops` fails first."""
    waiting = asyncio.ensure_future(stop.wait())
    failing = asyncio.ensure_future(loops.failed())
    try:
        await asyncio.wait({waiting, failing}, return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            failing.result()
    finally:
        for task in (waiting, failing):
            task.cancel()
        await asyncio.gather(waiting, failing, return_exceptions=True)
