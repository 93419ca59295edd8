"""What a journal holds, and when: pure, without a proxy."""

import json
from typing import Any

import msgspec
import pytest

from services.proxy.continuation.memo import Memo
from services.proxy.continuation.plan import Continuation, plan
from services.proxy.continuation.tape import Options, Tape
from services.proxy.resume.journal import FULL_BYTES, Journal, Keeping
from shared.models.deployment import StreamFailover

STREAM_HEAD = [(b"content-type", b"text/event-stream")]
BODY = json.dumps({"temperature": 0, "messages": [], "max_tokens": 50, "stop": "xyz"}).encode()


def event(text: str, token: int, **fields: Any) -> bytes:  # noqa: ANN401 - JSON
    """Make a chunk of a chat."""
    choice = {"delta": {"content": text}, "token_ids": [token], "finish_reason": None, **fields}
    chunk: dict[str, Any] = {"id": "c", "created": 1, "model": "m", "object": "o"}
    if token == 0:
        chunk["prompt_token_ids"] = [7, 8, 9]
    return b"data: " + json.dumps({**chunk, "choices": [choice]}).encode() + b"\n\n"


def journal() -> Journal:
    """Make one that is kept, without a client."""
    made = Journal("0" * 32, None, Tape(Options(lag_chars=2)))
    made.start(200, STREAM_HEAD)
    made.opened(kept=True)
    return made


def feed(to: Journal, data: bytes, *, more: bool = True) -> None:
    """Pass a replica's bytes on as a relay does."""
    to.write(to.tape.feed(data), more=more)


def test_a_finish_waits_for_the_last_event() -> None:
    """A journal tells of a finish only together with all that comes after it."""
    kept = journal()
    feed(kept, event("a", 0))
    first = kept.collect()
    assert first is not None
    assert (first.first, first.last) == (1, 1)
    feed(kept, event("b", 1) + event("", 2, finish_reason="stop"))
    assert kept.collect() is None
    feed(kept, b"data: [DONE]\n\n", more=False)
    last = kept.collect()
    assert last is not None
    assert (last.first, last.last) == (2, 4)
    assert last.events.endswith(b"id: 4\ndata: [DONE]\n\n")
    assert kept.collect() is None


def test_much_at_once_is_worth_an_append() -> None:
    """What fills an append does not wait for more; what ends a stream does not either."""
    kept = journal()
    feed(kept, event("a", 0))
    assert not kept.full.is_set()
    feed(kept, event("x" * FULL_BYTES, 1))
    assert kept.full.is_set()
    kept.collect()
    assert not kept.full.is_set()
    feed(kept, event("b", 2, finish_reason="stop") + b"data: [DONE]\n\n", more=False)
    assert kept.full.is_set()


def test_what_is_no_stream_has_no_journal() -> None:
    """An answer that is not a stream is never numbered."""
    made = Journal("0" * 32, None, Tape(Options()))
    made.start(400, [(b"content-type", b"application/json")])
    made.opened(kept=True)
    made.write(b"{}", more=False)
    assert (made.keeping, made.last, made.collect()) == (Keeping.NONE, 0, None)


@pytest.mark.parametrize("flush", [1, 2, 3, 7])
def test_a_recalled_tape_goes_on_alike(flush: int) -> None:
    """However it was flushed, a tape that is made again asks for the same continuation."""
    kept, memos = journal(), list[Memo]()
    for token in range(20):
        feed(kept, event("é" if token % 3 else "ab", token))
        if token % flush == 0 and (append := kept.collect()):
            memos.append(msgspec.json.decode(append.tape, type=Memo))
            recalled = Tape.recall(kept.tape.options, memos)
            plans = [
                plan(b"/v1/chat/completions", BODY, tape, StreamFailover.VALID, context_tokens=99)
                for tape in (kept.tape, recalled)
            ]
            one, other = plans
            assert isinstance(one, Continuation)
            assert isinstance(other, Continuation)
            assert (one.path, one.body, one.exact, one.kept_tokens) == (
                other.path,
                other.body,
                other.exact,
                other.kept_tokens,
            )
            assert recalled.cut() == kept.tape.cut()
            assert (recalled.ids, recalled.chars) == (kept.tape.ids, kept.tape.chars)
            assert recalled.failovers == kept.tape.failovers
            kept.tape.failovers += 1


def test_tokens_that_are_sampled_anew_are_forgotten() -> None:
    """After a sampled continuation, a tape made again has only the new ones."""
    tape = Tape(Options())
    for token in range(5):
        tape.feed(event("a", token))
    memos = [tape.memo()]
    going_on = plan(
        b"/v1/chat/completions", b'{"messages":[]}', tape, StreamFailover.VALID, context_tokens=99
    )
    assert isinstance(going_on, Continuation)
    tape.splice(going_on.seam, kept_tokens=3)
    memos.append(tape.memo())
    recalled = Tape.recall(Options(), memos)
    assert recalled.ids == tape.ids
    assert len(recalled.ids) == 3
