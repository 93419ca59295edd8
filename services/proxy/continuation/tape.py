"""What was delivered of one stream: enough to go on from another replica, and no more.

A tape sits between the replica's bytes and the client's. It passes on whole events only, keeps
the token ids, counts the text, strips the ids the client did not ask for, and knows whether the
stream ended well. When the replica is lost, `cut` says from where another one can go on without a
flaw; `splice` makes what that one sends the continuation of this stream.

Where a stream may be cut. A replica that is given ids which end inside a character begins its
answer with the decoded text of the *whole* prompt. So a cut is made only after an event that
brought text with a single new id: engines show text only when everything up to there is whole
characters, and with several ids in one event nobody knows which of them brought it. With stop
strings an engine holds back as many characters as a stop string may still need: at such an event
it has generated that many more than it has shown.

Cost: one parse of the event's few interesting fields, and one substitution over its bytes.
"""

import re
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import msgspec

from services.proxy.continuation.chunks import (
    MAX_ID,
    Choice,
    Chunk,
    Delta,
    decode_chunk,
    decode_identity,
    decode_logprobs,
    error_text,
)
from services.proxy.continuation.memo import Memo
from services.proxy.continuation.rules import stop_strings
from services.proxy.continuation.seam import Seam

MAX_EVENT_BYTES: Final = 16 << 20
"""An event that is longer is none."""
END: Final = b"\n\n"
DONE: Final = b"data: [DONE]"
MAX_ID_DIGITS: Final = 9
"""Of a usual chunk's token id (as in carrier.c): it fits `MAX_ID`, whatever its digits."""
NO_IDS_SENT: Final = "the replica sends no token ids"
ODD_IDS: Final = "the replica sends token ids that are none"
_DATA: Final = b"data: {"
_IDS: Final = re.compile(rb'token_ids":\[[^\]]*\]')
"""`token_ids` or `prompt_token_ids` with a value. It cannot match within a string: there, the
quote would have a backslash before it."""
_NO_IDS: Final = b'token_ids":null'
_TAIL: Final = b"]}]}\n\n"
_NULL_TAIL: Final = b"null}]}\n\n"
_USUAL_CHAT: Final = (
    b'"delta":{"content":"',
    b'"},"logprobs":null,"finish_reason":null,"token_ids":[',
)
_NULLS: Final = b'","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null'
_USUAL_COMPLETION: Final = (b'"text":"', _NULLS + b',"token_ids":[')
"""What stands before and after the text of a chunk of vLLM's."""


class Options(NamedTuple):
    """What a tape must know of its request."""

    lag_chars: int = 0
    """Characters that the engine holds back for stop strings."""
    margin_chars: int = 0
    """Delivered characters that must be generated again: a stop string may have begun in them."""
    wants_ids: bool = False
    """The client asked for token ids itself."""
    offsets: bool = False
    """The answer tells where each token's text begins (a completion with log probabilities)."""

    @classmethod
    def of(cls, *, stop: object, shows_stop: bool, wants_ids: bool, offsets: bool) -> "Options":
        """Make them of a request's `stop` and of what it wants to see."""
        longest = max(map(len, stop_strings(stop)), default=1) - 1 if stop else 0
        return cls(
            lag_chars=0 if shows_stop else longest,
            margin_chars=longest if shows_stop else 0,
            wants_ids=wants_ids,
            offsets=offsets,
        )


class Cut(NamedTuple):
    """From where another replica goes on."""

    kept_tokens: int
    """Generated tokens that it is given."""
    skip_chars: int
    """Characters at the beginning of its text that were delivered already."""


class Tape:
    """One stream, as it was delivered."""

    __slots__ = (
        "_after_text",
        "_before_text",
        "_chars",
        "_first",
        "_introduced",
        "_marks",
        "_next_offset",
        "_options",
        "_rest",
        "_seam",
        "_steady",
        "_told",
        "done",
        "error",
        "failovers",
        "finished",
        "ids",
        "prompt_ids",
        "refusal",
        "usage_told",
    )

    def __init__(self, options: Options) -> None:
        self._options = options
        self._steady = not (options.lag_chars or options.margin_chars or options.wants_ids)
        self.reset()

    def reset(self) -> None:
        """Forget everything: nothing was delivered."""
        self._rest: bytes = b""
        self._first: bytes = b""
        self._seam: Seam | None = None
        self._before_text = b""
        self._after_text = b""
        self._chars = 0
        self._next_offset = 0
        self._introduced = False
        self._told = 0
        self._marks: deque[tuple[int, int]] = deque([(0, 0)])
        self.prompt_ids = array("I")
        self.ids = array("I")
        """Token ids delivered so far, whether or not their text could be shown."""
        self.finished = False
        """A finish reason was delivered: the answer is whole."""
        self.usage_told = False
        self.done = False
        """The event that ends a stream was delivered, too."""
        self.failovers = 0
        """How often the stream has lost its replica and gone on elsewhere."""
        self.error = ""
        """Why the replica's stream cannot go on; empty while it can."""
        self.refusal = ""
        """Why no other replica can go on, by what was seen; empty if nothing speaks against it."""

    def forget_try(self) -> None:
        """Forget what a replica left unfinished; what was delivered stays."""
        self._rest = b""
        self.error = ""

    @property
    def chars(self) -> int:
        """Characters delivered."""
        return self._chars

    @property
    def next_offset(self) -> int:
        """Where the next token's text begins, for log probabilities that say so."""
        return self._next_offset

    @property
    def options(self) -> Options:
        """What the tape knows of its request."""
        return self._options

    @property
    def first(self) -> bytes:
        """The payload of the first chunk: who this stream is."""
        return self._first

    def feed(self, data: bytes) -> bytes:
        """Take the replica's next bytes; return the events they complete, in the client's shape.

        Sets `error` where the stream says or shows that it is lost; what came before is returned.
        """
        if event := self.usual(data):
            return event
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if not data.endswith(END):
            cut = data.rfind(END) + len(END) if END in data else 0
            self._rest = data[cut:]
            if len(self._rest) > MAX_EVENT_BYTES:
                self.error = "the replica sent an event without an end"
                return b""
            data = data[:cut]
        if not data:
            return b""
        events = data.split(END)
        del events[-1]
        if self._seam is not None:
            return self._spliced(events, self._seam)
        for number, event in enumerate(events):
            if not self._note(event):
                data = self._without(events, number)
                break
        return data if self._options.wants_ids else _IDS.sub(_NO_IDS, data)

    def usual(self, data: bytes) -> bytes:
        """Take one chunk that looks like the one before it, without parsing it; else return none.

        Nearly every chunk differs from the last one in its text and its one token id only. What
        stands between the two known parts is text if it has no quote and no escape.
        """
        before = self._before_text
        if not before or not data.startswith(before):
            return b""
        begin, after = len(before), self._after_text
        at = data.find(after, begin)
        text = data[begin:at]
        token = data[at + len(after) : -len(_TAIL)]
        if (
            at < 0
            or self._rest
            or not text
            or b'"' in text
            or b"\\" in text
            or not token.isdigit()
            or len(token) > MAX_ID_DIGITS
            or not data.endswith(_TAIL)
        ):
            return b""
        ids = self.ids
        ids.append(int(token))
        self._chars += len(text) if text.isascii() else len(text.decode(errors="replace"))
        self._marks[0] = (len(ids), self._chars)
        return data[: at + len(after) - 1] + _NULL_TAIL

    @property
    def shape(self) -> tuple[bytes, bytes] | None:
        """What usual chunks have before and after their text; None where none are expected."""
        if not self._before_text or self._rest or self.finished:
            return None
        return self._before_text, self._after_text

    def carried(self, ids: "array[int]", chars: int) -> None:
        """Note usual chunks that were taken elsewhere as `usual` takes them."""
        if ids:
            self.ids.extend(ids)
            self._chars += chars
            self._marks[0] = (len(self.ids), self._chars)

    def cut(self) -> Cut:
        """Say from where another replica may go on."""
        kept, generated_chars = self._marks[0]
        return Cut(kept, self._chars - generated_chars)

    def splice(self, seam: Seam, *, kept_tokens: int | None = None) -> None:
        """Take what comes next as the continuation that `seam` was made for.

        `kept_tokens`: the ids beyond are sampled anew, so forget them; None keeps all.
        """
        self.forget_try()
        self._seam = seam
        self._before_text = b""
        if kept_tokens is not None:
            del self.ids[kept_tokens:]
            self._marks = deque([self._marks[0]])
            self._told = min(self._told, kept_tokens)

    def memo(self) -> Memo:
        """Say what has changed since the last memo: all memos together make this tape again."""
        told, introduces = self._told, bool(self._first) and not self._introduced
        self._told = len(self.ids)
        self._introduced = self._introduced or introduces
        return Memo(
            kept=told,
            ids=self.ids[told:].tolist(),
            chars=self._chars,
            marks=list(self._marks),
            next_offset=self._next_offset,
            finished=self.finished,
            refusal=self.refusal,
            failovers=self.failovers,
            prompt_ids=self.prompt_ids.tolist() if introduces else None,
            identity=decode_identity(self._first) if introduces else None,
        )

    @classmethod
    def recall(cls, options: Options, memos: Iterable[Memo]) -> "Tape":
        """Make a tape again from all of its memos, in order."""
        tape = cls(options)
        for memo in memos:
            tape._recall(memo)
        return tape

    def _recall(self, memo: Memo) -> None:
        del self.ids[memo.kept :]
        self.ids.extend(memo.ids)
        self._told = len(self.ids)
        self._chars = memo.chars
        self._marks = deque(memo.marks)
        self._next_offset = memo.next_offset
        self.finished = memo.finished
        self.refusal = memo.refusal
        self.failovers = memo.failovers
        if memo.prompt_ids is not None:
            self.prompt_ids = array("I", memo.prompt_ids)
        if memo.identity is not None:
            self._first = msgspec.json.encode(memo.identity)
            self._introduced = True

    def _note(self, event: bytes) -> bool:
        """Note one event; False if it must not be delivered (see `error`), or need not."""
        if not event.startswith(_DATA):
            return event != DONE or self._ends()
        try:
            chunk = decode_chunk(event[6:])
            if self._options.offsets:
                self._next_offset = self._offset_after(event[6:])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.error = f"the replica sent a chunk that does not parse: {error}"
            return False
        if chunk.error is not None:
            self.error = error_text(chunk.error)
            return False
        if not chunk.choices:
            self.usage_told = True
            return True
        if not self._first:
            self._begin(event[6:], chunk)
        return self._note_choice(event, chunk.choices[0])

    def _ends(self) -> bool:
        """Note that the stream says that it has ended; False (see `error`) if it cannot have."""
        self.done = self.finished
        if not self.done:
            self.error = "the replica ended the stream without a finish reason"
        return self.done

    def _note_choice(self, event: bytes, choice: Choice) -> bool:
        if choice.finish_reason is not None:
            self.finished = True
        delta = choice.delta
        text = choice.text
        if delta is not None:
            text = delta.content
            if delta.tool_calls or delta.reasoning or delta.reasoning_content:
                self.refusal = "its reasoning or tool calls are parsed from the text as it comes"
        ids = choice.token_ids
        if ids:
            self._keep(self.ids, ids)
        elif text:
            self.refusal = self.refusal or NO_IDS_SENT
        if text:
            self.delivered(len(text), whole=ids is not None and len(ids) == 1)
            if self._steady and not self._before_text:
                self._learn(event)
        return text is not None or not _empty(delta, choice, event)

    def _keep(self, kept: "array[int]", ids: Sequence[int]) -> None:
        """Keep token ids; one that no engine takes keeps its place only, and nobody goes on."""
        if ids and not 0 <= min(ids) <= max(ids) <= MAX_ID:
            self.refusal = ODD_IDS
            ids = [each if 0 <= each <= MAX_ID else 0 for each in ids]
        kept.extend(ids)

    def delivered(self, chars: int, *, whole: bool) -> None:
        """Count text that goes to the client; `whole`: the tokens so far end with a character."""
        self._chars += chars
        marks = self._marks
        if whole:
            marks.append((len(self.ids), self._chars + self._options.lag_chars))
        reach = self._chars - self._options.margin_chars
        while len(marks) > 1 and marks[1][1] <= reach:
            marks.popleft()

    def _begin(self, payload: bytes, chunk: Chunk) -> None:
        self._first = payload
        prompt_ids = chunk.prompt_token_ids or chunk.choices[0].prompt_token_ids
        if prompt_ids:
            self._keep(self.prompt_ids, prompt_ids)
        else:
            self.refusal = NO_IDS_SENT
        try:
            decode_identity(payload)
        except msgspec.DecodeError as error:
            self._first = b"{}"
            self.refusal = f"the replica does not say well which stream it is: {error}"

    def _learn(self, event: bytes) -> None:
        """Note what the chunks of this stream have in common."""
        for before, after in (_USUAL_CHAT, _USUAL_COMPLETION):
            at = event.find(before)
            if at > 0 and after in event:
                self._before_text, self._after_text = event[: at + len(before)], after

    def _offset_after(self, payload: bytes) -> int:
        """Say where the text of the token after this chunk's will begin."""
        choices = decode_logprobs(payload).choices
        logprobs = choices[0].logprobs if choices else None
        if logprobs is not None and logprobs.tokens and logprobs.text_offset:
            return logprobs.text_offset[-1] + len(logprobs.tokens[-1])
        return self._next_offset

    def _without(self, events: list[bytes], number: int) -> bytes:
        """Put together what may be delivered of `events`, whose `number`th may not."""
        kept = events[:number]
        if not self.error:
            for event in events[number + 1 :]:
                if self._note(event):
                    kept.append(event)
                elif self.error:
                    break
        return b"".join(event + END for event in kept)

    def _spliced(self, events: list[bytes], seam: Seam) -> bytes:
        """Turn a continuation's events into this stream's; those it had already come to nothing."""
        out: list[bytes] = []
        for event in events:
            if not event.startswith(_DATA):
                if event == DONE and not self._ends():
                    break
                out.append(event)
                continue
            turned = seam.turn(event[6:])
            if turned.error:
                self.error = turned.error
                break
            self._keep(self.ids, turned.ids)
            if turned.text:
                self.delivered(len(turned.text), whole=turned.whole)
            self._next_offset = turned.next_offset
            self.finished = self.finished or turned.finished
            self.usage_told = self.usage_told or turned.usage
            if turned.payload:
                out.append(_DATA[:-1] + turned.payload)
        return b"".join(event + END for event in out)


def _empty(delta: Delta | None, choice: Choice, event: bytes) -> bool:
    """Tell whether a chunk is there only because token ids were asked for.

    Where a parser of tool calls or reasoning holds text back, vLLM sends an empty delta with the
    ids; without ids it would have sent nothing.
    """
    return (
        delta is not None
        and delta == _NOTHING
        and choice.finish_reason is None
        and b'"logprobs":null' in event
    )


_NOTHING: Final = Delta()
