"""Knowing whether a client is still there, by what ASGI receives from it."""

import asyncio

from litestar.types import Receive


class Presence:
    """Waits until the client is gone or the answer complete; `cut` ends it without an end.

    Returning from an ASGI application before the answer is complete makes the server close the
    connection, which is how a client learns that a plain text broke off.
    """

    __slots__ = ("_cut", "_receive", "_task")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._task = asyncio.current_task()
        self._cut = False

    def cut(self) -> None:
        """End the wait."""
        self._cut = True
        if self._task is not None:
            self._task.cancel()

    async def for_the_end(self) -> None:
        """Wait; raises CancelledError only if somebody else cancelled."""
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        except asyncio.CancelledError:
            if not self._cut or self._task is None or self._task.uncancel() > 0:
                raise
