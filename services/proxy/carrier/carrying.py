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

from services.proxy.carrier import compiled

ENDED: Final = 0
UNUSUAL: Final = 1
SLOW: Final = 2
WHOLE: Final = 3
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

    def carried_whole(self) -> None:
        """Go on after an answer whose last bytes were carried, too; reads again."""
        ...

    def give_up(self) -> None:
        """Close at once, and tell whom it serves that the answer is lost."""
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
        self._report: compiled.Report = library.carrier_report(self._self).contents
        self._streams: dict[int, Carried] = {}
        self._run: Any = library.carrier_run
        self.taken = 0
        """Streams that were given to the library so far."""
        self.tokens = 0
        """Events that were carried, of streams that were taken back."""
        # What came with tokens goes first: a request's steps are few, and waited for.
        loop.add_reader(library.carrier_fd(self._self), loop.call_soon, self._carry)

    @property
    def streams(self) -> int:
        """How many streams are in the library now."""
        return len(self._streams)

    def offer(self, source: Source, target: Target, listener: object) -> None:
        """Carry a stream from now on, if all that was written has been sent.

        `listener` is whom the source is thought to serve: if it is another one, nothing is done.
        """
        if target.offers >= MAX_OFFERS or (shape := target.shape) is None:
            return
        target.offers += 1
        if self._self is None or source.carried is not None or (down := target.lend()) < 0:
            return
        up = source.lend(listener)
        if up < 0:
            return
        before, after = shape
        place = self._library.carrier_add(
            self._self, up, down, before, len(before), after, len(after)
        )
        if place < 0:
            source.take_back(b"")
            return
        self.taken += 1
        source.carried = self._streams[place] = Carried(self, place, source, target)

    def heard_s(self, place: int) -> float:
        """Tell when something of a stream was read last."""
        return float(self._library.carrier_heard_s(self._self, place))

    def take(self, place: int) -> None:
        """Take a stream back, and tell its target what was carried."""
        carried = self._streams.pop(place)
        carried.source.carried = None
        self._library.carrier_remove(self._self, place)
        report = self._report
        events, count = report.events, report.ids_count
        ids = array("I")
        if count:
            ids.frombytes(ctypes.string_at(report.ids or 0, count * ids.itemsize))
        self.tokens += events
        carried.target.carried(Told(events, report.chars, ids))

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

    def _carry(self) -> None:
        """Carry what has come, and handle what is given back."""
        run, me = self._run, self._self
        while me is not None and (place := run(me)) >= 0:
            source = self._streams[place].source
            try:
                self._given_back(place)
            except Exception as error:  # noqa: BLE001 - others have come, whose edges are told once
                self._loop.call_exception_handler(
                    {"message": "a stream that was carried was not handled", "exception": error}
                )
                source.give_up()  # else nobody would read it, until a deadline
            me = self._self  # what was handled may have ended us

    def _given_back(self, place: int) -> None:
        """Take a stream back, and handle what was read of it last."""
        report = self._report
        kind, whole, size = report.kind, report.whole, report.bytes
        data = ctypes.string_at(report.data or 0, size) if size else b""
        carried = self._streams[place]
        source, target = carried.source, carried.target
        self.take(place)
        if kind == WHOLE:
            source.carried_whole()
        elif kind == SLOW and whole:
            target.write_rest(data)
            source.carried_whole()
        elif kind == SLOW:
            source.take_back(b"")
            if not target.write_rest(data):
                source.pause()
        else:
            source.take_back(data)


def descriptor(transport: asyncio.BaseTransport) -> int:
    """Give the descriptor of a transport's socket; -1 where it writes other bytes than it is given.

    It is the transport's until `connection_lost` has been called.
    """
    opened = transport.get_extra_info("socket")
    if opened is None or transport.get_extra_info("sslcontext") is not None:
        return -1
    return int(opened.fileno())


def make_carrier(loop: asyncio.AbstractEventLoop) -> Carrier | None:
    """Make the carrier of a proxy; None where the library was not built."""
    library = compiled.load()
    return None if library is None else Carrier(library, loop)
