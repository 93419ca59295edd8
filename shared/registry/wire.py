"""Redis for the data plane: one connection, commands as they come, replies by callback.

Commands are written at once and their replies matched in order, without a task, future or coroutine
for each. What was asked is answered exactly once, with a reply or with an error of the client
library as a value, and never within the call that asked: when the connection ends, everything under
way on it is answered with the reason.

The client library opens each connection and greets the server, so that every option of the URL, TLS
and rotated passwords mean here what they mean everywhere; then this protocol takes its place on the
transport. A connection that leaves a command unanswered for the timeout is given up. While there is
none, the next command makes one, and others wait for it with that; after a failure, commands are
refused at once until a pause has passed that grows to a quarter of a second.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, cast

import hiredis
import redis.asyncio.client
import redis.exceptions

FIRST_PAUSE_S: Final = 0.02
LONGEST_PAUSE_S: Final = 0.25
MAX_UNANSWERED: Final = 4096
"""Commands under way or waiting for a connection; more are refused at once."""
STALL_S: Final = 0.05
"""A timer that is later than this says that our own loop stood still, not Redis."""

Argument = str | bytes | int
OnReply = Callable[[Any], None]
"""Called with a reply, or with an exception as a value."""

_NOTHING: Final = object()
_pack = cast("Callable[[tuple[Argument, ...]], bytes]", cast("Any", hiredis).pack_command)
_CODES: Final = {
    "NOSCRIPT": redis.exceptions.NoScriptError,
    "READONLY": redis.exceptions.ReadOnlyError,
}


class Head(NamedTuple):
    """The beginning that many commands share, encoded once."""

    parts: int
    packed: bytes


def head_of(*parts: Argument) -> Head:
    """Encode a beginning."""
    packed = _pack(parts)
    return Head(len(parts), packed[packed.index(b"\n") + 1 :])


class Wire(asyncio.Protocol):
    """One open connection."""

    def __init__(self, timeout_s: float, lost: Callable[["Wire", Exception], None]) -> None:
        self._timeout_s = timeout_s
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(replyError=_trouble, notEnoughData=_NOTHING)
        self._unanswered: deque[tuple[OnReply, float]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._before: asyncio.BaseProtocol | None = None
        self._transport: asyncio.WriteTransport = cast("Any", None)
        self.proven = False
        """It has answered a command with something else than an error."""

    def __len__(self) -> int:
        return len(self._unanswered)

    def take_over(self, writer: asyncio.StreamWriter) -> None:
        """Go on with a transport on which the server has been greeted."""
        self._writer = writer  # kept: a stream that is collected closes its transport
        self._transport = writer.transport
        self._before = self._transport.get_protocol()
        self._transport.set_protocol(self)

    def send(self, packed: bytes, on_reply: OnReply) -> None:
        """Send a command."""
        now_s = self._loop.time()
        self._unanswered.append((on_reply, now_s))
        self._transport.write(packed)
        if self._timer is None:
            due_s = now_s + self._timeout_s
            self._timer = self._loop.call_at(due_s, self._check, due_s)

    def end(self, error: Exception) -> None:
        """Close, and answer everything under way with `error`, soon."""
        self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        unanswered, self._unanswered = self._unanswered, deque()
        for on_reply, _ in unanswered:
            self._loop.call_soon(on_reply, error)
        self._lost(self, error)

    def data_received(self, data: bytes) -> None:
        """Hand replies to those who wait for them."""
        reply: Any = _NOTHING
        last: Any = _NOTHING
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _NOTHING:
                on_reply, _ = self._unanswered.popleft()
                last = reply
                try:
                    on_reply(reply)
                except Exception as error:  # noqa: BLE001 - as the loop does: one's error is no other's
                    self._loop.call_exception_handler(
                        {"message": "a reply of Redis was not handled", "exception": error}
                    )
        except (hiredis.ProtocolError, IndexError):
            self.end(redis.exceptions.ConnectionError("it does not answer as Redis does"))
        if last is not _NOTHING and not isinstance(last, Exception):
            self.proven = True

    def eof_received(self) -> None:
        """Use it no more, from this moment on."""
        self.end(redis.exceptions.ConnectionError("the server closed the connection"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Answer everything under way with the reason."""
        if self._before is not None:
            self._before.connection_lost(exc)  # the library's stream ends with its transport
            self._before = None
        self.end(redis.exceptions.ConnectionError(f"the connection ended: {exc}"))
        self._writer = None

    def _check(self, due_s: float) -> None:
        """Give the connection up if its oldest command has waited for too long."""
        self._timer = None
        if not self._unanswered:
            return
        now_s = self._loop.time()
        again_s = self._unanswered[0][1] + self._timeout_s
        if again_s <= now_s:
            if now_s <= due_s + STALL_S:
                self.end(redis.exceptions.TimeoutError("no answer"))
                return
            again_s = now_s + STALL_S / 2  # what arrived while we stood still is read first
        self._timer = self._loop.call_at(again_s, self._check, again_s)


class WireClient:
    """Redis at one address, over one connection at a time.

    Takes a client of the library, which opens the connections, and whose subscriptions are its own.
    """

    def __init__(self, library: redis.asyncio.Redis, *, timeout_s: float, open_s: float) -> None:
        self._library = library
        self._timeout_s = timeout_s
        self._open_s = open_s
        """Within this a connection must be open and the server greeted."""
        self._wire: Wire | None = None
        self._opening: asyncio.Task[None] | None = None
        self._waiting: list[tuple[bytes, OnReply]] = []
        self._failures = 0
        self._again_s = 0.0
        self._trouble: Exception = redis.exceptions.ConnectionError("not connected")
        self._closed = False

    def submit(
        self, parts: Sequence[Argument], on_reply: OnReply, head: Head | None = None
    ) -> None:
        """Send one command of `head` and `parts`; `on_reply` is called once, later."""
        packed = _pack(tuple(parts))
        if head is not None:
            rest = packed[packed.index(b"\n") + 1 :]
            packed = b"*%d\r\n%b%b" % (head.parts + len(parts), head.packed, rest)
        wire = self._wire
        if wire is not None and len(wire) < MAX_UNANSWERED:
            wire.send(packed, on_reply)
            return
        loop = asyncio.get_running_loop()
        if wire is not None or len(self._waiting) >= MAX_UNANSWERED:
            full = redis.exceptions.ConnectionError("too many commands are under way")
            loop.call_soon(on_reply, full)
        elif self._closed or (self._opening is None and loop.time() < self._again_s):
            loop.call_soon(on_reply, self._trouble)
        else:
            self._waiting.append((packed, on_reply))
            if self._opening is None:
                self._opening = loop.create_task(self._open())

    async def execute_command(self, *parts: Argument) -> Any:  # noqa: ANN401 - any reply
        """Send one command and wait for its reply; who waits also waits out a pause."""
        loop = asyncio.get_running_loop()
        if self._wire is None and (pause_s := self._again_s - loop.time()) > 0:
            await asyncio.sleep(pause_s)
        future: asyncio.Future[Any] = loop.create_future()

        def answered(reply: Any) -> None:  # noqa: ANN401 - any reply
            if future.done():
                return  # nobody waits any more
            if isinstance(reply, Exception):
                future.set_exception(reply)
            else:
                future.set_result(reply)

        self.submit(parts, answered)
        return await future

    def drop(self) -> None:
        """Give the connection up; the next command resolves the address again."""
        if self._wire is not None:
            self._wire.end(redis.exceptions.ConnectionError("given up: it leads to a replica"))

    def pubsub(self) -> redis.asyncio.client.PubSub:
        """Open a subscription, over a connection of its own."""
        return cast("Any", self._library).pubsub()

    async def aclose(self) -> None:
        """Close; what is under way or waits is answered with an error."""
        self._closed = True
        self._trouble = redis.exceptions.ConnectionError("closed by us")
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        if self._wire is not None:
            self._wire.end(self._trouble)
        self._refuse_waiting()
        await self._library.aclose()

    async def _open(self) -> None:
        pool: Any = self._library.connection_pool
        connection: Any = None
        try:
            connection = pool.make_connection()
            async with asyncio.timeout(self._open_s):
                await connection.connect()
            wire = Wire(self._timeout_s, self._wire_lost)
            # Taken from the library, which would close it.
            writer, connection._reader, connection._writer = connection._writer, None, None  # noqa: SLF001
            wire.take_over(writer)
        except Exception as error:  # noqa: BLE001 - whoever waits is told, whatever it is
            self._pause(error)
            self._refuse_waiting()
        else:
            self._wire = wire
            waiting, self._waiting = self._waiting, []
            for packed, on_reply in waiting:
                wire.send(packed, on_reply)
        finally:
            self._opening = None
            if connection is not None:
                await connection.disconnect(nowait=True)

    def _wire_lost(self, wire: Wire, error: Exception) -> None:
        if wire is not self._wire:
            return
        self._wire = None
        if wire.proven:
            self._failures = 0
            self._again_s = 0.0
        else:
            self._pause(error)

    def _pause(self, error: Exception) -> None:
        """Let nobody try again for a moment, so that a fleet of proxies is no storm."""
        self._trouble = error
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._failures, 8))
        self._failures += 1
        jitter = random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, protects nothing
        self._again_s = asyncio.get_running_loop().time() + pause_s * jitter

    def _refuse_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for _, on_reply in waiting:
            asyncio.get_running_loop().call_soon(on_reply, self._trouble)


def _trouble(text: str) -> redis.exceptions.ResponseError:
    """Make what Redis calls an error one of the library's."""
    return _CODES.get(text.partition(" ")[0], redis.exceptions.ResponseError)(
        text.removeprefix("ERR ")
    )
