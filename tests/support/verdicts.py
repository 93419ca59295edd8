"""Judging an answer: what makes a chat stream good, and what kind of failure anything else is.

Pure, so that the judge itself can be tested: a load test proves nothing if its judge sees every
truncated answer as a success.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Final

import msgspec


class Outcome(StrEnum):
    """How one request ended."""

    OK = "ok"
    REFUSED = "refused"
    """No connection to a proxy."""
    RESET = "reset"
    """The connection ended before the answer did."""
    STATUS = "status"
    """A whole answer, but not of status 200."""
    ERROR_EVENT = "error-event"
    """A well-formed stream whose last event is an error object of OpenAI's shape."""
    TRUNCATED = "truncated"
    """A clean end without all that a success must have: the one thing that must never be seen."""
    DIFFERENT = "different"
    """A whole answer with another text than the same user's earlier ones."""
    MALFORMED = "malformed"
    """Something that is not chunked SSE of JSON events."""
    TIMEOUT = "timeout"


def dechunked(data: bytes) -> bytes | None:
    """Join the chunks of a chunked body; None if it is not whole and well-formed."""
    pieces: list[bytes] = []
    position = 0
    while True:
        line = data.find(b"\r\n", position)
        if line < 0:
            return None
        try:
            size_bytes = int(data[position:line], 16)
        except ValueError:
            return None
        start, position = line + 2, line + 2 + size_bytes + 2
        if data[position - 2 : position] != b"\r\n":
            return None
        if size_bytes == 0:
            return b"".join(pieces) if position == len(data) else None
        pieces.append(data[start : position - 2])


class _Usage(msgspec.Struct, frozen=True):
    completion_tokens: int = 0


class _Choice(msgspec.Struct, frozen=True):
    finish_reason: str | None = None


class _Error(msgspec.Struct, frozen=True):
    message: str
    type: str
    code: int | str | None


class _Event(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: _Error | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Said(msgspec.Struct, frozen=True):
    delta: _Delta = _Delta()


class _Text(msgspec.Struct, frozen=True):
    choices: tuple[_Said, ...] = ()


_EVENT: Final = msgspec.json.Decoder(_Event)
_TEXT: Final = msgspec.json.Decoder(_Text)


def judge(status: int, body: bytes | None, tokens: int) -> tuple[Outcome, str]:
    """Judge an answer by its status and its whole body (None if it did not come whole)."""
    if body is None:
        return Outcome.RESET, "the connection ended before the answer did"
    if status != 200:
        return Outcome.STATUS, f"{status} {body[:200].decode(errors='replace')}"
    lines = body.split(b"\n\n")
    if lines.pop() or any(not line.startswith(b"data: ") for line in lines):
        return Outcome.MALFORMED, f"not SSE: {body[-200:].decode(errors='replace')}"
    done = bool(lines) and lines[-1] == b"data: [DONE]"
    try:
        events = [_EVENT.decode(line[6:]) for line in lines[: len(lines) - done]]
    except msgspec.MsgspecError as error:
        return Outcome.MALFORMED, f"{error}: {body[-200:].decode(errors='replace')}"
    return _judge_events(events, done=done, tokens=tokens)


def text_of(body: bytes) -> str:
    """Join the text of a chat stream that was judged to be good."""
    return "".join(
        choice.delta.content or ""
        for line in body.split(b"\n\n")[:-2]
        for choice in _TEXT.decode(line[6:]).choices
    )


def _judge_events(events: Sequence[_Event], *, done: bool, tokens: int) -> tuple[Outcome, str]:
    finish, produced = None, -1
    for number, event in enumerate(events):
        if event.error is not None:
            last = number == len(events) - 1
            return Outcome.ERROR_EVENT if last else Outcome.MALFORMED, event.error.message
        if event.choices and event.choices[0].finish_reason is not None:
            finish = event.choices[0].finish_reason
        if event.usage is not None:
            produced = event.usage.completion_tokens
    if not done or finish != "length" or produced != tokens:
        return (
            Outcome.TRUNCATED,
            f"finish_reason {finish}, {produced} of {tokens} tokens, [DONE] {done}",
        )
    return Outcome.OK, ""
