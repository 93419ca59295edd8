"""Streams that are carried outside of the interpreter: given to the library, and taken back.

Once a stream runs, nearly all of its reads are whole chunks of usual events, and what is done with
each is the same. The library does that from socket to socket for as long as it goes on. Whatever
else happens (an unusual event, the end, a slow client, a lost replica, a deadline) has the stream
taken back first: its relay is told what was carried, its connection reads again, and what was read
last is handled as if it had just come. Nobody else has to know.

Invariant: a stream is in the library exactly while its connection is `carried`, and both of its
sockets are open then: a connection that is aborted or lost, and a client that leaves, take it back
before their sockets are closed.
"""

import asyncio
import ctypes
from array import array
from typing import Any, Final, NamedTuple, Protocol

from services.proxy.carrier.compiled import load

ENDED: Final = 0
UNUSUAL: Final = 1
SLOW: Final = 2
"""Why the library gives a stream back (as in carrier.c)."""

MAX_OFFERS: Final = 16
"""A stream that was given back that often is left to Python."""

PASSED_ON: Final = (b"", b"")
"""The shape of a stream whose chunks are passed on as they are."""


class Told(NamedTuple):
    """What was carried of a stream."""

    events: int
    chars: int
    """Of an armed stream only, as its token ids."""
    ids: "array[int]"


class Source(Protocol):
    """The connection to a replica that reads a stream."""

    carried: "Carried | None"

    def lend(self, listener: object) -> int:
        """Stop reading; give the socket's descriptor, or -1 where it cannot be lent now."""
        ...

    def take_back(self, data: bytes) -> None:
        """Read again, after `data` has been handled as if it had just been read."""
        ...

    def pause(self) -> None:
        """Read nothing for now."""
        ...


class Target(Protocol):
    """Who tells the stream to its client."""

    offers: int
    """How often the stream was offered."""

    @property
    def shape(self) -> tuple[bytes, bytes] | None:
        """What usual events have before and after their text; None: it cannot be carried now."""
        ...

    def lend(self) -> int:
        """Give the descriptor of the client's socket, or -1 where it cannot be lent now."""
        ...

    def carried(self, told: Told) -> None:
        """Learn what was carried."""
        ...

    def write_rest(self, rest: bytes) -> bool:
        """Write what the client's socket had no room for; tell whether to go on reading."""
        ...


class Carried:
    """One stream in the library."""

    __slots__ = ("_carrier", "_place", "source", "target")

    def __init__(self, carrier: "Carrier", place: int, source: Source, target: Target) -> None:
        self._carrier = carrier
        self._place = place
        self.source = source
        self.target = target

    @property
    def heard_s(self) -> float:
        """When something was read last, on the loop's clock."""
        return self._carrier.heard_s(self._place)

    def end(self) -> None:
        """Take the stream back."""
        self._carrier.take(self._place)


class Carrier:
    """All streams of a proxy that are in the library."""

    def __init__(self, library: ctypes.PyDLL, loop: asyncio.AbstractEventLoop) -> None:
        self._library = library
        self._loop = loop
        self._self: int | None = library.carrier_new()
        if self._self is None:
            raise OSError("no descriptor, or no memory, for the carrier")
        self._left = library.carrier_left(self._self).contents
        self._streams: dict[int, Carried] = {}
        self._run: Any = library.carrier_run
        self.taken = 0
        """Streams that were given to the library so far."""
        self.tokens = 0
        """Events that were carried, of streams that were taken back."""
        loop.add_reader(library.carrier_fd(self._self), self._ready)

    @property
    def streams(self) -> int:
        """How many streams are in the library now."""
        return len(self._streams)

    def offer(self, source: Source, target: Target, listener: object) -> None:
        """Carry a stream from the loop's next turn on, when what was written has been sent.

        `listener` is whom the source serves: if that is another one then, nothing is done.
        """
        if target.offers >= MAX_OFFERS or target.shape is None:
            return
        target.offers += 1
        self._loop.call_soon(self._enter, source, target, listener)

    def heard_s(self, place: int) -> float:
        """Tell when something of a stream was read last."""
        return float(self._library.carrier_heard_s(self._self, place))

    def take(self, place: int) -> None:
        """Take a stream back, and tell its target what was carried."""
        carried = self._streams.pop(place)
        carried.source.carried = None
        events, chars, count = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_uint64()
        ids = ctypes.c_void_p()
        library = self._library
        library.carrier_told(self._self, place, events, chars, count, ids)
        copy = array("I")
        if count.value:
            copy.frombytes(ctypes.string_at(ids.value or 0, count.value * copy.itemsize))
        library.carrier_remove(self._self, place)
        self.tokens += events.value
        carried.target.carried(Told(events.value, chars.value, copy))

    def close(self) -> None:
        """Take everything back, and end; nothing can be offered any more."""
        if self._self is None:
            return
        for place in list(self._streams):
            source = self._streams[place].source
            self.take(place)
            source.take_back(b"")
        self._loop.remove_reader(self._library.carrier_fd(self._self))
        self._library.carrier_free(self._self)
        self._self = None

    def _enter(self, source: Source, target: Target, listener: object) -> None:
        if self._self is None or source.carried is not None or (shape := target.shape) is None:
            return
        down = target.lend()
        if down < 0:
            return
        up = source.lend(listener)
        if up < 0:
            return
        before, after = shape
        place = self._library.carrier_add(
            self._self, up, down, before, len(before), after, len(after), self._loop.time()
        )
        if place < 0:
            source.take_back(b"")
            return
        self.taken += 1
        source.carried = self._streams[place] = Carried(self, place, source, target)

    def _ready(self) -> None:
        """Carry what has come, and handle what is given back."""
        run, me, now_s = self._run, self._self, self._loop.time()
        while (place := run(me, now_s)) >= 0:
            left = self._left
            data = ctypes.string_at(left.data, left.bytes) if left.bytes else b""
            kind = left.kind
            carried = self._streams[place]
            source, target = carried.source, carried.target
            self.take(place)
            if kind == SLOW:
                source.take_back(b"")
                if not target.write_rest(data):
                    source.pause()
            else:
                source.take_back(data)
            if self._self is None:
                return  # what was handled has ended us


def make_carrier(loop: asyncio.AbstractEventLoop) -> Carrier | None:
    """Make the carrier of a proxy; None where the library was not built."""
    library = load()
    return None if library is None else Carrier(library, loop)
