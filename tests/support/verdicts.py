"""Judging an answer: what makes a chat stream good, and what kind of failure anything else is.

Pure, so that the judge itself can be tested: a load test proves nothing if its judge sees every
truncated answer as a success.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple

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
    """A whole answer that tells something else than the same user's earlier ones."""
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


class _Logprobs(msgspec.Struct, frozen=True):
    content: tuple[Any, ...] = ()
    tokens: tuple[str, ...] = ()
    token_logprobs: tuple[float | None, ...] = ()
    text_offset: tuple[int, ...] = ()


class _Said(msgspec.Struct, frozen=True):
    delta: _Delta = _Delta()
    text: str | None = None
    logprobs: _Logprobs | None = None
    stop_reason: str | int | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: tuple[_Said, ...] = ()
    usage: dict[str, Any] | None = None


_EVENT: Final = msgspec.json.Decoder(_Event)
_CHUNK: Final = msgspec.json.Decoder(_Chunk)


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A request for a stream with usage, and how its answer must end."""

    body: bytes
    path: str = "/v1/chat/completions"
    finish: str = "length"
    tokens: int | None
    """Of the answer; None: it is not known before."""


class Told(NamedTuple):
    """What a good stream says, however it was cut into chunks."""

    text: str
    rest: str
    """Log probabilities, stop reason and usage."""


def judge(
    status: int, body: bytes | None, tokens: int | None, finish: str = "length"
) -> tuple[Outcome, str]:
    """Judge an answer by its status and its whole body (None if it did not come whole).

    A good one has so many `tokens` (None: any number but none) and ends for the reason `finish`.
    """
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
    return _judge_events(events, done=done, tokens=tokens, wanted=finish)


def told(body: bytes) -> Told:
    """Say what a stream tells that was judged to be good."""
    text: list[str] = []
    logprobs: list[Any] = []
    stop_reason: str | int | None = None
    usage: dict[str, Any] | None = None
    for line in body.split(b"\n\n")[:-2]:
        chunk = _CHUNK.decode(line[6:])
        usage = chunk.usage or usage
        for said in chunk.choices:
            text.append(said.text or said.delta.content or "")
            stop_reason = said.stop_reason or stop_reason
            if (given := said.logprobs) is not None:
                logprobs += given.content
                logprobs += zip(given.tokens, given.token_logprobs, given.text_offset, strict=True)
    return Told("".join(text), f"{logprobs} {stop_reason!r} {usage}")


def _judge_events(
    events: Sequence[_Event], *, done: bool, tokens: int | None, wanted: str
) -> tuple[Outcome, str]:
    finish, produced = None, -1
    for number, event in enumerate(events):
        if event.error is not None:
            last = number == len(events) - 1
            return Outcome.ERROR_EVENT if last else Outcome.MALFORMED, event.error.message
        if event.choices and event.choices[0].finish_reason is not None:
            finish = event.choices[0].finish_reason
        if event.usage is not None:
            produced = event.usage.completion_tokens
    counted = produced > 0 if tokens is None else produced == tokens
    if not done or finish != wanted or not counted:
        return (
            Outcome.TRUNCATED,
            f"finish_reason {finish}, {produced} of {tokens} tokens, [DONE] {done}",
        )
    return Outcome.OK, ""
