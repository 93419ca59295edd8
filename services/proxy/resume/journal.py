"""One resumable stream on its way from a replica to its journal and its client.

To the exchange it looks like a client that is never slow. What the exchange writes gets numbers,
is collected for Redis, and is shown to the client, if there is one, once Redis has it: whoever
resumes has seen nothing that the journal lacks, also where nobody could generate it again. While
Redis is away the client gets everything at once, and the journal catches up later.

The finish of a stream is held back until its very last event is there: a journal that tells of a
finish is whole.
"""

import asyncio
from collections import deque
from enum import Enum
from typing import Final

import msgspec

from services.proxy.client import Client, Headers
from services.proxy.continuation.tape import Tape
from services.proxy.resume.events import numbered
from shared.registry.streams import Append

FULL_BYTES: Final = 4096
"""What is collected is worth an append of its own."""


class Keeping(Enum):
    """What becomes of the events."""

    OPENING = 0
    """Redis has been asked for a journal."""
    KEPT = 1
    GIVEN_UP = 2
    """The journal has ended before the stream; the client gets the rest as it comes."""
    NONE = 3
    """There is no journal, and the client is not told of one."""


class Journal:
    """The events of one stream. `woken` is set when there is something to do."""

    def __init__(self, stream: str, client: Client | None, tape: Tape) -> None:
        self.client = client
        """Who asked first; None once it is gone."""
        self.tape = tape
        self.keeping = Keeping.OPENING
        self.started = False
        self.ended = False
        """The exchange has written all."""
        self.last = 0
        """Number of the last event."""
        self.size_bytes = 0
        """What the journal holds, with what is collected for it."""
        self.woken = asyncio.Event()
        self.full = asyncio.Event()
        """Set when waiting for more makes no sense."""
        self._stream = stream.encode()
        self._head: tuple[int, Headers] | None = None
        self._early: list[bytes] = []
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self.collected = 0
        """Number of the last event that an append has taken."""
        self._unseen: deque[tuple[int, bytes]] = deque()
        """What the client has not been shown, by the number of its last event."""
        self._at_once = False

    def recall(self, last: int, size_bytes: int) -> None:
        """Go on with a journal that another proxy began; nobody is attached."""
        self.keeping = Keeping.KEPT
        self.started = last > 0
        self.last = self.collected = last
        self.size_bytes = size_bytes

    # what an exchange writes to (client.Outlet)

    @property
    def stalled(self) -> bool:
        """Tell whether to produce no more: never, while a journal bounds what is produced."""
        kept = self.keeping in {Keeping.OPENING, Keeping.KEPT}
        return not kept and self.client is not None and self.client.stalled

    def start(self, status: int, headers: Headers) -> None:
        """Take the head of the answer."""
        self.started = True
        self._head = (status, headers)
        if status != 200 or not any(value.startswith(b"text/event-stream") for _, value in headers):
            self.keeping = Keeping.NONE

    def write(self, body: bytes, *, more: bool) -> None:
        """Take events; the last ones with `more` false."""
        self.ended = not more
        if self.keeping is Keeping.OPENING:
            self._early.append(body)
        else:
            self._take(body)
        if self.ended or self._pending_bytes >= FULL_BYTES:
            self.full.set()
        self.woken.set()

    # what keeps it

    def opened(self, *, kept: bool) -> None:
        """Learn whether there is a journal."""
        if self.keeping is Keeping.OPENING:
            self.keeping = Keeping.KEPT if kept else Keeping.NONE
        early = b"".join(self._early)
        self._early.clear()
        if early or self.ended:
            self._take(early)

    def collect(self) -> Append | None:
        """Give what is to be added to the journal; None if there is nothing, or not yet."""
        self.woken.clear()
        if not self._pending or (self.tape.finished and not self.ended):
            return None
        append = Append(
            first=self.collected + 1,
            last=self.last,
            events=b"".join(self._pending),
            tape=msgspec.json.encode(self.tape.memo()),
        )
        self.size_bytes += len(append.tape)
        self.collected = self.last
        self._pending.clear()
        self._pending_bytes = 0
        self.full.clear()
        return append

    def confirmed(self, last: int) -> None:
        """Show the client what the journal has, up to event `last`."""
        self._at_once = False
        unseen = self._unseen
        parts: list[bytes] = []
        while unseen and unseen[0][0] <= last:
            parts.append(unseen.popleft()[1])
        if parts or self._over:
            self._show(b"".join(parts))

    def show_all(self) -> None:
        """Let the client no longer wait for the journal."""
        self._at_once = True
        self._show(b"".join(events for _, events in self._unseen), rest=True)

    def give_up(self) -> None:
        """Keep no journal from now on."""
        self.keeping = Keeping.GIVEN_UP
        self._pending.clear()
        self.show_all()

    def detach(self) -> None:
        """Go on without a client."""
        self.client = None
        self._unseen.clear()

    @property
    def _over(self) -> bool:
        return self.ended and not self._unseen

    def _take(self, body: bytes) -> None:
        if self.keeping is not Keeping.NONE:
            body, self.last = numbered(body, self.last)
        if self.keeping is Keeping.KEPT:
            if body:
                self._pending.append(body)
                self._pending_bytes += len(body)
                self.size_bytes += len(body)
                if self.client is not None:
                    self._unseen.append((self.last, body))
            if self._at_once:
                self.show_all()
        else:
            self._show(body)

    def _show(self, events: bytes, *, rest: bool = False) -> None:
        if rest:
            self._unseen.clear()
        client = self.client
        if client is None or client.ended:
            return
        if not client.started and self._head is not None:
            status, headers = self._head
            if self.keeping is not Keeping.NONE:
                headers = [*headers, (b"x-redmesh-stream", self._stream)]
            client.start(status, headers)
        last = self.ended and not self._unseen
        if client.started and (events or last):
            client.write(events, more=not last)
