"""Driving a coroutine by hand, so that the common case costs no task.

An ASGI `send` that can write at once finishes in its first step. Calling it from a protocol's
`data_received` costs a function call instead of a task, a future and a wake-up for each chunk of
a stream. Where it must wait (the client is slow), what is left of it can be awaited in a task.
"""

from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Rest(Generic[T]):
    """What is left of a coroutine that waits for something; await it once, or close it."""

    __slots__ = ("_coroutine", "_waits_for")

    def __init__(self, coroutine: Coroutine[Any, Any, T], waits_for: object) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, T]:
        # The future was already yielded once, by hand; the task that runs this has not seen it.
        try:
            yield self._waits_for
        except BaseException:
            self._coroutine.close()
            raise
        return (yield from self._coroutine.__await__())

    def close(self) -> None:
        """Give up: the coroutine's `finally` blocks run now."""
        self._coroutine.close()


def step(coroutine: Coroutine[Any, Any, T]) -> Rest[T] | None:
    """Run `coroutine` until it is done (None; its result is dropped) or has to wait."""
    try:
        waits_for = coroutine.send(None)
    except StopIteration:
        return None
    return Rest(coroutine, waits_for)


def begin(coroutine: Coroutine[Any, Any, T]) -> tuple[T, None] | tuple[None, Rest[T]]:
    """Run `coroutine` until it is done (its result first) or has to wait (the rest second)."""
    try:
        waits_for = coroutine.send(None)
    except StopIteration as done:
        return done.value, None
    return None, Rest(coroutine, waits_for)
