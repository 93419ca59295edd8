"""Turning a replica's answer into the client's: passed through.

Server-sent events are passed on as the bytes they are, from the first on; anything else whole, so
that it can be fetched again until it is complete. A relay says after each read how the answer
stands, and knows whether there is still a way back (nothing written) or not.

An armed stream runs over a tape, which knows what was delivered. When its replica is lost, the
answer of another one goes on where it broke off: see `go_on`.
"""

import re
from enum import Enum
from typing import Final

import msgspec

from services.proxy import refusals
from services.proxy.carrier.carrying import PASSED_ON, Told
from services.proxy.client import Outlet
from services.proxy.continuation.tape import Tape
from services.proxy.framing import LAST_CHUNK
from services.proxy.lane import DirectCycle
from services.proxy.refusals import Dialect, Refusal
from services.proxy.retry import ENGINE_DEAD, Failure, classify
from services.proxy.upstream import EVENT_STREAM, Head

UNARY_BUFFER_BYTES: Final = 8 << 20
"""An answer that is not a stream is held back up to this size; beyond it, it is passed on as it
comes, and can no longer be fetched again. One that ends with its connection is held back whole:
only its JSON tells whether it was cut."""

WHOLE: Final = b"\n\n\r\n"
"""How a chunk of whole events ends."""

JSON: Final = b"application/json"
_NO_HEAD: Final = Head(0)
_COMPLETION_TOKENS: Final = b'"completion_tokens":'
_NUMBER: Final = re.compile(rb"[ \t]*([0-9]{1,12})")


class Step(Enum):
    """How an answer stands after a read."""

    GOES_ON = 0
    STARTED = 1
    """The first bytes have just been written (and perhaps the last: see `ended`)."""
    ENDED = 2
    BROKEN = 3
    """It cannot be completed, and the client has seen a part of it."""
    FAILED = 4
    """The try came to nothing: try again. The client has seen nothing of it."""
    LOST = 5
    """The replica is lost in the middle of a stream that may go on elsewhere."""


class Relay:
    """Passes an answer through."""

    def __init__(
        self, client: Outlet, *, request_id: bytes, dialect: Dialect, model: str, path: str
    ) -> None:
        self.client = client
        """Where the answer goes."""
        self._request_id = request_id
        self._dialect = dialect
        self._model = model
        self._path = path
        self._head = _NO_HEAD
        self._streams = False
        self._in_chunks = False
        """What is read are the replica's chunks, to be passed on as they are."""
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._last = b""
        self._goes_on = False
        """A stream has begun, and another replica is to go on with it."""
        self.goes_on = False
        """And now it does."""
        self.tape: Tape | None = None
        """Set for an armed stream."""
        self.lane: DirectCycle | None = None
        """Set where the client can be given chunks as they are: those of the replica, unless the
        stream is armed, and carried ones."""
        self.offers = 0
        """How often the stream was offered to the carrier."""
        self.failure: Failure | None = None
        self.detail = ""
        self.outcome = "2xx"
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens relayed; events where they are not counted: near enough for estimates."""
        return self._tokens if self.tape is None else len(self.tape.ids) or self._tokens

    @property
    def started(self) -> bool:
        """Tell whether the client has seen something: then there is no way back."""
        return self.client.started

    def head(self, head: Head) -> bool:
        """Take the head of the replica's answer; tell whether its chunks are wanted as they are."""
        self._head = head
        self._streams = head.status == 200 and head.content_type.startswith(EVENT_STREAM)
        self.goes_on = self._goes_on and self._streams
        self._in_chunks = (
            self._streams and head.in_chunks and self.tape is None and self.lane is not None
        )
        return self._in_chunks

    def feed(self, data: bytes, *, complete: bool) -> Step:
        """Take the next bytes; `complete` with the last."""
        if self._streams:
            tape = self.tape
            if tape is None:
                return self._feed_stream(data, complete=complete)
            return self._feed_tape(tape, data, complete=complete)
        if self.client.started:
            return self._feed_begun(data, complete=complete)
        if complete:
            return self._whole(b"".join((*self._held, data)) if self._held else data)
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > UNARY_BUFFER_BYTES and self._head.framed:
            self._start()
            self.client.write(b"".join(self._held), more=True)
            self._held.clear()
            return Step.STARTED
        return Step.GOES_ON

    def usual(self, data: bytes) -> bool:
        """Pass on the next bytes of a stream that has begun, if nothing about them is unusual."""
        if self._in_chunks and self.lane is not None:
            self._tokens += data.count(b"\n\n")
            self._last = data
            self.lane.write_chunks(data, more=True)
            return True
        if self.tape is not None and (event := self.tape.usual(data)):
            self.client.write(event, more=True)
            return True
        return False

    @property
    def shape(self) -> tuple[bytes, bytes] | None:
        """How the stream's usual chunks look, if they may be carried (`carrier.carrying`)."""
        if self.lane is None or self.client.ended:
            return None
        if self.tape is not None:
            return self.tape.shape
        return PASSED_ON if self._in_chunks else None

    def lend(self) -> int:
        """Give the client's socket, if it can be written to without us; else -1."""
        return -1 if self.lane is None else self.lane.lend()

    def carried(self, told: Told) -> None:
        """Note what was carried."""
        if self.tape is not None:
            self.tape.carried(told.ids, told.chars)
        elif told.events:
            self._tokens += told.events
            self._last = WHOLE

    def write_rest(self, rest: bytes) -> bool:
        """Write chunks that the client had no room for; tell whether it has room for more."""
        if self.lane is not None:
            self.lane.write_chunks(rest, more=True)
        return not self.client.stalled

    def reset(self) -> None:
        """Forget a try that came to nothing."""
        self._held.clear()
        self._held_bytes = 0
        self._head = _NO_HEAD
        self._streams = self.goes_on = False
        self.failure = None
        if self.tape is not None and not self.client.started:
            self.tape.reset()

    def go_on(self) -> None:
        """Expect the answer of another replica that goes on with the stream."""
        self._goes_on = True
        self.reset()

    def complete(self, events: bytes) -> None:
        """Write the last events of a stream that lost its replica at its very end."""
        self._deliver(events, last=True)

    def refuse(self, refusal: Refusal) -> None:
        """Answer with an error of our own."""
        body = refusal.body(self._dialect)
        self.client.start(refusal.status, refusal.headers(self._request_id, body))
        self.client.write(body, more=False)

    def break_off(self, refusal: Refusal) -> bool:
        """End a begun answer as an error; False where only cutting the connection can tell."""
        if not self._streams and not self._goes_on:
            return False
        whole = self.tape is not None or self._last.endswith((b"\n\n", WHOLE))
        boundary = b"" if whole else b"\n\n"
        self.client.write(boundary + refusal.event(self._dialect), more=False)
        return True

    def _feed_stream(self, data: bytes, *, complete: bool) -> Step:
        first = not self.client.started
        if first:
            if not data and not complete:
                return Step.GOES_ON
            if ENGINE_DEAD in data:
                return self._fail(Failure.ENGINE_DEAD, "its engine has died")
            if not data or (self._in_chunks and data == LAST_CHUNK):
                return self._fail(Failure.RESET, "an empty stream")
            self._start()
        self._tokens += data.count(b"\n\n")
        if self._in_chunks and self.lane is not None:
            self._last = data
            self.lane.write_chunks(data, more=not complete)
        elif not complete or self._head.framed or b"[DONE]" in self._last + data:
            if data:
                # Without framing the end is known by its words, and reads may split them.
                self._last = data if self._head.framed else self._last[-16:] + data
            self.client.write(data, more=not complete)
        else:
            self.client.write(data, more=True)
            self._last = data or self._last
            self.detail = "the replica closed the connection before the end"
            return Step.BROKEN
        if first:
            return Step.STARTED
        return Step.ENDED if complete else Step.GOES_ON

    def _feed_tape(self, tape: Tape, data: bytes, *, complete: bool) -> Step:
        first = not self.client.started
        events = tape.feed(data)
        error = tape.error
        if complete and not tape.finished and not error:
            error = "the replica ended the stream without a finish reason"
        if error:
            dead = ENGINE_DEAD.decode() in error
            step = self._fail(Failure.ENGINE_DEAD if dead else Failure.RESET, error)
            if first:
                return step  # what came before the error is dropped with the try: nobody saw it
            self._deliver(events, last=False)
            return Step.LOST
        if events or complete:
            self._deliver(events, last=complete)
        if first:
            return Step.STARTED if self.client.started else Step.GOES_ON
        return Step.ENDED if complete else Step.GOES_ON

    def _deliver(self, events: bytes, *, last: bool) -> None:
        """Write whole events."""
        if not self.client.started:
            self._start()
        self.client.write(events, more=not last)

    def _feed_begun(self, data: bytes, *, complete: bool) -> Step:
        if self._goes_on:
            return self._no_continuation(data, complete=complete)
        self.client.write(data, more=not complete)
        return Step.ENDED if complete else Step.GOES_ON

    def _no_continuation(self, data: bytes, *, complete: bool) -> Step:
        """Take an answer that should have gone on with a stream, and is none."""
        if self._held_bytes < UNARY_BUFFER_BYTES:
            self._held.append(data)
            self._held_bytes += len(data)
        if not complete:
            return Step.GOES_ON
        body = b"".join(self._held)
        failure = classify(self._head.status, body)
        if failure is not None:
            return self._fail(failure, f"it answered {self._head.status}")
        self.detail = f"the replica that was to go on answered {self._head.status}"
        return Step.BROKEN

    def _whole(self, body: bytes) -> Step:
        head = self._head
        status = head.status
        if status == 200 and head.framed and not head.retry_after and self.lane is not None:
            self._tokens = _completion_tokens(body)
            self.lane.write_whole(head.content_type or JSON, body)
            return Step.STARTED
        failure = classify(status, body)
        if failure is not None:
            return self._fail(failure, f"it answered {status}")
        if not head.framed and not _is_json(body):
            return self._fail(Failure.RESET, "it closed the connection in the middle")
        if status in {401, 403}:
            self._own(refusals.replica_key_refused(self._model))
        elif status == 404 and b'"error"' not in body:
            self._own(refusals.unserved_route(self._model, self._path))
        else:
            self.outcome = _outcome(status)
            self._tokens = _completion_tokens(body)
            self._start(len(body))
            self.client.write(body, more=False)
        return Step.STARTED

    def _own(self, refusal: Refusal) -> None:
        self.outcome = _outcome(refusal.status)
        self.refuse(refusal)

    def _fail(self, failure: Failure, detail: str) -> Step:
        self.failure = failure
        self.detail = detail
        return Step.FAILED

    def _start(self, length: int | None = None) -> None:
        head = self._head
        headers = [
            (b"content-type", head.content_type or JSON),
            (b"x-request-id", self._request_id),
        ]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        if head.retry_after:
            headers.append((b"retry-after", head.retry_after))
        if self._streams:
            headers.append((b"cache-control", b"no-cache"))
            headers.append((b"x-accel-buffering", b"no"))
        self.client.start(head.status, headers)


def _outcome(status: int) -> str:
    return "2xx" if status < 400 else "4xx" if status < 500 else "5xx"


def _is_json(body: bytes) -> bool:
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


def _completion_tokens(body: bytes) -> int:
    at = body.rfind(_COMPLETION_TOKENS)
    if at < 0:
        return 0
    number = _NUMBER.match(body, at + len(_COMPLETION_TOKENS))
    return int(number[1]) if number else 0
