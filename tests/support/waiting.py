"""Waiting for a condition instead of for time.

A test that sleeps is either slow or flaky; a test that polls for what it waits for is
neither, and says what did not happen when it fails.
"""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable


async def wait_until(
    predicate: Callable[[], object] | Callable[[], Awaitable[object]],
    *,
    timeout_s: float = 10.0,
    interval_s: float = 0.02,
    what: str = "",
) -> None:
    """Return as soon as `predicate` (plain or async) is true.

    Raises AssertionError naming `what` (or the predicate) after `timeout_s` seconds. The
    deadline also cuts short an async predicate that hangs.
    """
    name = what or _name(predicate)
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if inspect.isawaitable(value):
            left_s = deadline - time.monotonic()
            try:
                # Not `wait_for`, which in Python 3.11 may swallow a cancellation.
                async with asyncio.timeout(max(left_s, interval_s)):
                    value = await value
            except TimeoutError:
                raise AssertionError(f"not within {timeout_s:g} s: {name}") from None
        if value:
            return
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {name}")
        await asyncio.sleep(interval_s)


def wait_until_sync(
    predicate: Callable[[], object],
    *,
    timeout_s: float = 10.0,
    interval_s: float = 0.02,
    what: str = "",
) -> None:
    """Do what `wait_until` does, for tests without an event loop."""
    name = what or _name(predicate)
    deadline = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {name}")
        time.sleep(interval_s)


def _name(predicate: object) -> str:
    return str(getattr(predicate, "__qualname__", predicate))
