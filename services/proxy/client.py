"""The client's side of an answer: ASGI `send`, driven by hand, with backpressure.

While the client keeps up, every message is written where it is produced, without a task. When the
client is slow, one owned task carries on and the producer is told to pause; what was produced in
between waits in order.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from litestar.types import Message

from services.proxy.stepping import Rest, step

Headers = Sequence[tuple[bytes, bytes]]


class Outlet(Protocol):
    """Where an answer goes: to a client, or to a journal that has readers."""

    @property
    def started(self) -> bool:
        """Tell whether the head has been written: there is no way back."""
        ...

    @property
    def stalled(self) -> bool:
        """Tell whether no more should be produced for now."""
        ...

    @property
    def ended(self) -> bool:
        """Tell whether the last byte has been handed over."""
        ...

    def start(self, status: int, headers: Headers) -> None:
        """Write the head of the answer."""
        ...

    def write(self, body: bytes, *, more: bool) -> None:
        """Write a piece of the body; the last one with `more` false."""
        ...


class Client:
    """Writes one answer."""

    __slots__ = ("_flowing", "_pumps", "_queue", "_send", "ended", "stalled", "started")

    def __init__(
        self,
        send: Any,  # noqa: ANN401 - typed Awaitable by ASGI, a coroutine function in fact
        pumps: set[asyncio.Task[None]],
    ) -> None:
        self._send = send
        self._pumps = pumps
        self._flowing: Callable[[], None] | None = None
        self._queue: deque[Message] = deque()
        self.started = False
        """The head has been written: there is no way back."""
        self.stalled = False
        """The client does not take what there is: do not produce more."""
        self.ended = False

    def on_flow(self, flowing: Callable[[], None]) -> None:
        """Call `flowing` whenever a stalled client has taken what there was."""
        self._flowing = flowing

    def start(self, status: int, headers: Headers) -> None:
        """Write the head of the answer."""
        self.started = True
        self._push({"type": "http.response.start", "status": status, "headers": headers})

    def write(self, body: bytes, *, more: bool) -> None:
        """Write a piece of the body; the last one with `more` false."""
        self.ended = not more
        self._push({"type": "http.response.body", "body": body, "more_body": more})

    def _push(self, message: Message) -> None:
        if self.stalled:
            self._queue.append(message)
            return
        rest = step(self._send(message))
        if rest is not None:
            self.stalled = True
            task = asyncio.get_running_loop().create_task(self._pump(rest))
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(self, rest: Rest[None]) -> None:
        await rest
        while self._queue:
            await self._send(self._queue.popleft())
        self.stalled = False
        if self._flowing is not None:
            self._flowing()
