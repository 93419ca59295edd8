"""Virtual time: processes with event loops of their own, stepped one at a time by one timeline.

Each process has a real asyncio loop whose clock is the timeline's and whose selector never waits:
when a loop has nothing to do, it says until when, and the timeline goes on with whoever is next. So
a process can be frozen (its loop is not stepped, its timers and messages pile up), killed, or have
a clock of its own, and one seed decides the order of everything.
"""

import asyncio
import heapq
import itertools
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

NEVER: Final = float("inf")
START_S: Final = 1000.0
"""Monotonic clocks of real machines are not near zero either."""


class _Idle(selectors.BaseSelector):
    """A selector without files: instead of waiting it stops the loop and says how long to wait."""

    def __init__(self, asleep: Callable[[float | None], None]) -> None:
        self._asleep = asleep

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:  # noqa: ANN401 - as its base has it
        return selectors.SelectorKey(fileobj, -1, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:  # noqa: ANN401 - as its base has it
        return selectors.SelectorKey(fileobj, -1, 0, None)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {}

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self._asleep(timeout)
        return []


class _Loop(asyncio.SelectorEventLoop):
    """A loop that reads its process's clock."""

    def __init__(self, process: "Process") -> None:
        self._process = process
        super().__init__(_Idle(process.asleep))

    def time(self) -> float:
        return self._process.monotonic_s()


class Process:
    """One program: a loop, a clock that may run a little fast or slow, and a state."""

    def __init__(self, timeline: "Timeline", name: str, *, rate: float = 1.0) -> None:
        self.name = name
        self.frozen = False
        self.dead = False
        self.wake_s = NEVER
        self._timeline = timeline
        self._rate = rate
        self._tasks: set[asyncio.Task[None]] = set()
        self.loop = _Loop(self)
        self.loop.set_exception_handler(self._unhandled)
        timeline.processes.append(self)

    def monotonic_s(self) -> float:
        """Read this process's monotonic clock."""
        return START_S + self._timeline.now_s * self._rate

    def now_ms(self) -> int:
        """Read this process's wall clock."""
        return 1_700_000_000_000 + round(self._timeline.now_s * 1000)

    def start(self, body: Coroutine[Any, Any, None]) -> None:
        """Run `body` in this process; an error of it fails the simulation."""

        def begin() -> None:
            task = self.loop.create_task(body)
            self._tasks.add(task)
            task.add_done_callback(self._ended)

        self.post(begin)

    def post(self, act: Callable[[], object]) -> None:
        """Let something reach this process from outside; it acts as soon as it runs."""
        if not self.dead:
            self.loop.call_soon(act)
            self.wake_s = min(self.wake_s, self._timeline.now_s)

    def step(self) -> None:
        """Let the process do all that is due now."""
        self.wake_s = NEVER
        self.loop.run_forever()

    def asleep(self, timeout_s: float | None) -> None:
        """Note that nothing is to be done for a while (called by the loop)."""
        wait_s = NEVER if timeout_s is None else timeout_s / self._rate
        self.wake_s = self._timeline.now_s + wait_s
        self.loop.stop()

    def kill(self) -> None:
        """End at once, as SIGKILL does: nothing of it runs any more."""
        self.dead = True
        self.wake_s = NEVER

    def close(self) -> None:
        """Dispose of the loop and of what still hangs in it."""
        self.dead = True
        self.loop.set_exception_handler(lambda _loop, _context: None)
        for _ in range(20):
            tasks = asyncio.all_tasks(self.loop)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            self.loop.run_forever()
        self.loop.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._timeline.fail(error)

    def _unhandled(self, _loop: object, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self._timeline.fail(
            error if isinstance(error, Exception) else RuntimeError(str(context["message"]))
        )


class Timeline:
    """The only clock, and what will happen outside of processes."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.processes: list[Process] = []
        self.after_step: Callable[[], None] = lambda: None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._failure: BaseException | None = None

    def at(self, when_s: float, act: Callable[[], None]) -> None:
        """Do something at a moment (not before now)."""
        heapq.heappush(self._events, (max(when_s, self.now_s), next(self._order), act))

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        """Do something in a while."""
        self.at(self.now_s + delay_s, act)

    def fail(self, error: BaseException) -> None:
        """End the simulation with an error, first come."""
        self._failure = self._failure or error

    def run_until(self, until_s: float) -> None:
        """Let time pass. Raises the first error of any process, event or check."""
        while True:
            event_s = self._events[0][0] if self._events else NEVER
            process = min(self.processes, key=_next_s, default=None)
            process_s = NEVER if process is None else _next_s(process)
            next_s = min(event_s, process_s)
            if next_s > until_s:
                self.now_s = until_s
                return
            self.now_s = max(self.now_s, next_s)
            if process is not None and process_s <= event_s:
                process.step()
            else:
                heapq.heappop(self._events)[2]()
            self.after_step()
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        """Dispose of every process."""
        self._events.clear()
        for process in self.processes:
            process.close()


def _next_s(process: Process) -> float:
    return NEVER if process.frozen or process.dead else process.wake_s
