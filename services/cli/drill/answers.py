"""Judging one streamed answer: what makes it good, and what kind of failure anything else is. Pure.

A drill proves nothing if its judge takes a truncated answer for a success: good is only what has
status 200, a finish reason, the tokens that were asked for, `[DONE]` last, and no error object.
"""

from typing import Final

import msgspec

from services.cli.drill.records import Outcome

_SHOWN: Final = 160


class _Usage(msgspec.Struct, frozen=True):
    completion_tokens: int = 0


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    finish_reason: str | None = None
    delta: _Delta | None = None


class _Error(msgspec.Struct, frozen=True):
    message: str = ""


class _Event(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: _Error | None = None


_EVENT: Final = msgspec.json.Decoder(_Event)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer came to."""

    outcome: Outcome
    detail: str = ""
    text: str = ""
    tokens: int = 0


def judge(status: int, body: bytes, *, whole: bool, tokens: int, reference: str | None) -> Answer:
    """Judge a stream of `tokens` tokens by its status and body.

    `whole`: the body ended as HTTP says. `reference` is the text of an undisturbed run, if it is
    to be compared.
    """
    if not whole:
        return Answer(
            outcome=Outcome.RESET, detail="the connection ended before the answer", text=""
        )
    if status != 200:
        return Answer(outcome=Outcome.STATUS, detail=f"HTTP {status}: {_shown(body)}")
    events = body.split(b"\n\n")
    if events.pop().strip() or any(not event.startswith(b"data: ") for event in events):
        return Answer(outcome=Outcome.MALFORMED, detail=f"not server-sent events: {_shown(body)}")
    done = bool(events) and events[-1] == b"data: [DONE]"
    try:
        parsed = [_EVENT.decode(event[6:]) for event in (events[:-1] if done else events)]
    except msgspec.MsgspecError as error:
        return Answer(outcome=Outcome.MALFORMED, detail=f"{error}: {_shown(body)}")
    return _judge_events(parsed, done=done, tokens=tokens, reference=reference)


def _judge_events(
    events: list[_Event], *, done: bool, tokens: int, reference: str | None
) -> Answer:
    finish: str | None = None
    produced = 0
    pieces: list[str] = []
    for event in events:
        if event.error is not None:
            return Answer(outcome=Outcome.ERROR_EVENT, detail=event.error.message[:_SHOWN])
        for choice in event.choices:
            finish = choice.finish_reason or finish
            if choice.delta is not None and choice.delta.content:
                pieces.append(choice.delta.content)
        if event.usage is not None:
            produced = event.usage.completion_tokens
    text = "".join(pieces)
    if not done or finish != "length" or produced != tokens:
        detail = f"finish_reason {finish}, {produced} of {tokens} tokens, [DONE] {done}"
        return Answer(outcome=Outcome.TRUNCATED, detail=detail, text=text, tokens=produced)
    if reference is not None and text != reference:
        at = next(
            (n for n, (a, b) in enumerate(zip(text, reference, strict=False)) if a != b),
            min(len(text), len(reference)),
        )
        detail = f"differs at character {at}: {text[at : at + 20]!r} != {reference[at : at + 20]!r}"
        return Answer(outcome=Outcome.DIFFERENT, detail=detail, text=text, tokens=produced)
    return Answer(outcome=Outcome.OK, text=text, tokens=produced)


def _shown(body: bytes) -> str:
    return body[:_SHOWN].decode(errors="replace")
