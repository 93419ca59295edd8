"""The journals of resumable streams: what was generated, so that any proxy can go on with it.

A journal has one writer at a time: the proxy that generates. It holds a lease, renewed by every
append; when the lease is over, another proxy may claim the stream, which raises its epoch, and the
former writer is refused from then on. Anybody may read. Journals end by themselves.
"""

from enum import StrEnum
from typing import Any, Final, NamedTuple

import msgspec

from shared.ids import check_name
from shared.registry.connection import Connection
from shared.registry.keys import Keys
from shared.registry.loader import ScriptSpec
from shared.registry.results import pairs, text_of, whole_number

TAG: Final = "s:<id>"
BOTH: Final = ("meta", "tokens")
PAGE_APPENDS: Final = 16

OPEN: Final = ScriptSpec("stream/open", TAG, ("meta",), ("OK", "TAKEN"))
APPEND: Final = ScriptSpec("stream/append", TAG, BOTH, ("OK", "FENCED", "ENDED", "GAP", "ABSENT"))
PAGE: Final = ScriptSpec("stream/read", TAG, BOTH, ("OK", "ABSENT"))
CLAIM: Final = ScriptSpec("stream/claim", TAG, BOTH, ("OK", "HELD", "ENDED", "ABSENT"))
CLOSE: Final = ScriptSpec("stream/close", TAG, BOTH, ("OK", "FENCED", "ABSENT"))
READ: Final = ScriptSpec("hash/read", "*", ("*",), ("OK",))


class StreamState(StrEnum):
    """How a resumable stream stands."""

    LIVE = "live"
    """It is being generated, or waits for somebody to go on with it."""
    DONE = "done"
    """Its last event is in the journal."""
    BROKEN = "broken"
    """It ended with an error event, which is in the journal."""
    CANCELLED = "cancelled"
    LOST = "lost"
    """Its journal was given up: it became too long, or a part of it was lost."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The request that a stream answers."""

    model: str
    path: str
    body: bytes
    request_id: str
    owner: str
    """Digest of who may read it."""


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a stream beside its events."""

    asked: Asked
    state: StreamState


class Writer(msgspec.Struct, frozen=True, kw_only=True):
    """Who writes a journal, and for how long that holds."""

    proxy: str
    epoch: int
    lease_ms: int
    life_ms: int
    """How long the journal lives after the last append."""


class Append(msgspec.Struct, frozen=True, kw_only=True):
    """Events that follow each other, and the tape as it stands after them."""

    first: int = 0
    last: int = 0
    """0: nothing is added, only the lease is renewed."""
    events: bytes = b""
    tape: bytes = b""


class Appended(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an append: `status` is the script's, OK or a refusal."""

    status: str
    idle_ms: int = -1
    """Since a reader looked; -1: none did."""


class Page(NamedTuple):
    """What follows a given event, and how the stream stands."""

    state: StreamState
    epoch: int
    last: int
    """Number of the last event in the journal."""
    lease_left_ms: int
    appends: list[tuple[int, bytes]]
    """Number of the first event, and the events."""


class Claimed(NamedTuple):
    """A stream that was taken over."""

    epoch: int
    size_bytes: int
    last: int
    tapes: list[bytes]
    """One for each append, in order."""
    whole: bool
    """No append is missing."""


class Streams:
    """The journals, as one proxy sees them."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys

    async def open(self, stream: str, writer: Writer, asked: Asked) -> bool:
        """Begin a journal; False if there is one with this id."""
        args = (
            *(check_name("proxy", writer.proxy), writer.lease_ms, writer.life_ms),
            *(asked.model, asked.path, asked.owner, asked.request_id, asked.body),
        )
        keys = self._keys.stream(stream).pick(OPEN.keys)
        reply = await self._connection.evalsha(OPEN, keys, args)
        return reply[0] == b"OK"

    async def append(
        self, stream: str, writer: Writer, append: Append, state: StreamState = StreamState.LIVE
    ) -> Appended:
        """Add to a journal and renew the lease; with nothing to add, only that."""
        args = (
            *(writer.proxy, writer.epoch, writer.lease_ms, writer.life_ms, state),
            *(append.first, append.last, append.events, append.tape),
        )
        keys = self._keys.stream(stream).pick(APPEND.keys)
        reply = await self._connection.evalsha(APPEND, keys, args)
        idle_ms = reply[1] if reply[0] == b"OK" else -1
        return Appended(status=text_of(reply[0]), idle_ms=idle_ms)

    async def known(self, stream: str) -> Known | None:
        """Read what a stream answers; None if there is none, or its record does not parse."""
        reply = await self._connection.evalsha(READ, (self._keys.stream(stream).meta,), ())
        fields = pairs(reply[1:])
        try:
            state = StreamState(text_of(fields[b"state"]))
            asked = Asked(
                model=text_of(fields[b"model"]),
                path=text_of(fields[b"path"]),
                body=fields[b"body"],
                request_id=text_of(fields[b"request"]),
                owner=text_of(fields[b"owner"]),
            )
        except (KeyError, ValueError):
            return None
        return Known(asked=asked, state=state)

    async def read(self, stream: str, after: int, count: int = PAGE_APPENDS) -> Page | None:
        """Read the events after event `after`; None if there is no such stream."""
        keys = self._keys.stream(stream).pick(PAGE.keys)
        reply = await self._connection.evalsha(PAGE, keys, (after, count))
        if reply[0] != b"OK":
            return None
        _, state, epoch, last, lease_left_ms, *flat = reply
        try:
            stands = StreamState(text_of(state))
        except ValueError:
            return None
        appends = [
            (whole_number(first), events)
            for first, events in zip(flat[::2], flat[1::2], strict=True)
        ]
        return Page(stands, whole_number(epoch), whole_number(last), lease_left_ms, appends)

    async def claim(self, stream: str, writer: Writer) -> Claimed | None:
        """Take over a stream whose lease is over; `writer.epoch` is the one that was seen.

        None if it is not to be had: its writer lives, another was faster, or it has ended.
        """
        args = (
            *(check_name("proxy", writer.proxy), writer.epoch),
            *(writer.lease_ms, writer.life_ms),
        )
        keys = self._keys.stream(stream).pick(CLAIM.keys)
        reply: list[Any] = await self._connection.evalsha(CLAIM, keys, args)
        if reply[0] != b"OK":
            return None
        _, epoch, size_bytes, written, *flat = reply
        at, whole = 0, True
        for first, last in zip(flat[::3], flat[1::3], strict=True):
            whole = whole and whole_number(first) == at + 1
            at = whole_number(last)
        last = whole_number(written)
        return Claimed(
            whole_number(epoch), whole_number(size_bytes), last, flat[2::3], whole and at == last
        )

    async def close(self, stream: str, state: StreamState, writer: Writer | None = None) -> bool:
        """End a stream for good: cancelled by its owner, or given up by its `writer`.

        False if another writer goes on with it: then nothing was done.
        """
        keys = self._keys.stream(stream).pick(CLOSE.keys)
        by = ("", 0) if writer is None else (writer.proxy, writer.epoch)
        reply = await self._connection.evalsha(CLOSE, keys, (str(state), *by))
        return reply[0] != b"FENCED"
