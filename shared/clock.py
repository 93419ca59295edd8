"""Time as an argument: one clock to store and show, another to subtract.

Wall-clock milliseconds are for records that others read; monotonic seconds are for deadlines and
ages inside one process. Code that decides takes time as a plain argument; only code that acts
holds a `Clock`.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """What a program may ask of time."""

    def now_ms(self) -> int:
        """Return the wall clock in integer milliseconds since the epoch."""
        ...

    def monotonic_s(self) -> float:
        """Return seconds that never run backwards, comparable only within this process."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now_ms(self) -> int:
        """Return the wall clock in integer milliseconds since the epoch."""
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        """Return seconds that never run backwards, comparable only within this process."""
        return time.monotonic()


class ManualClock:
    """A clock that moves only when a test moves it; both faces advance together."""

    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self._now_ms = now_ms
        self._monotonic_s = 0.0

    def now_ms(self) -> int:
        """Return the wall clock in integer milliseconds since the epoch."""
        return self._now_ms

    def monotonic_s(self) -> float:
        """Return seconds that never run backwards, comparable only within this process."""
        return self._monotonic_s

    def advance(self, seconds: float) -> None:
        """Move both clocks forward by `seconds`."""
        self._now_ms += round(seconds * 1000)
        self._monotonic_s += seconds
