"""The request that asks another replica to go on with a stream.

`plan` puts together the rules, what the tape holds and the client's own request. A continuation is
a completion over token ids, also where the request was a chat: the ids are the prompt as the
first replica saw it, and what it generated. A replay is the request itself once more.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

import msgspec

from services.proxy.continuation.chunks import decode_identity
from services.proxy.continuation.rules import CARRIED, Manner, Refused, Way, manner
from services.proxy.continuation.seam import Seam, Seen
from services.proxy.continuation.tape import DONE, END, NO_IDS_SENT, Tape
from shared.models.deployment import StreamFailover

COMPLETIONS: Final = b"/v1/completions"
CHAT: Final = b"/v1/chat/completions"
PATHS: Final = frozenset({CHAT, COMPLETIONS})
"""Routes whose streams can go on."""
DEFAULT_COMPLETION_TOKENS: Final = 16
"""What an engine generates for a completion that sets no limit."""


class Continuation(NamedTuple):
    """How one stream goes on."""

    path: bytes
    body: bytes
    seam: Seam
    exact: bool
    kept_tokens: int
    """Tokens of the answer that the next replica is given."""


def armed(body: bytes) -> bytes:
    """Ask for token ids with a request: the last of several equal fields counts."""
    end = body.rindex(b"}")
    return body[:end] + b',"return_token_ids":true}'


def plan(
    path: bytes,
    body: bytes,
    tape: Tape,
    policy: StreamFailover,
    *,
    context_tokens: int,
) -> Continuation | Refused:
    """Say how the stream on `tape` goes on; `body` is the client's request as it came.

    `context_tokens` bounds the answer of a chat that sets no limit (0: unknown).
    """
    if tape.refusal or not tape.first:
        return Refused(tape.refusal or NO_IDS_SENT)
    fields = _fields(body)
    how = manner(fields, policy)
    if isinstance(how, Refused):
        return how
    cut = tape.cut()
    limit = _limit(fields, path, context_tokens - len(tape.prompt_ids))
    if how.way is Way.CONTINUE:
        if how.exact and (cut.kept_tokens == 0 or (limit is not None and cut.kept_tokens >= limit)):
            how = Manner(Way.REPLAY, exact=True)
        elif not how.exact and (problem := _unsteady(tape, cut.skip_chars, fields)):
            return Refused(problem)
        elif not how.exact and limit is not None and cut.kept_tokens >= limit:
            return Refused("it has all its tokens, and only its replica knew how it ended")
        elif cut.kept_tokens == 0:
            how = Manner(Way.REPLAY, exact=False)
    replayed = how.way is Way.REPLAY
    kept = 0 if replayed else cut.kept_tokens
    top = fields.get("top_logprobs")
    seam = Seam(
        Seen(
            identity=decode_identity(tape.first),
            chat=path == CHAT,
            prompt_tokens=len(tape.prompt_ids),
            wants_ids=tape.options.wants_ids,
            next_offset=tape.next_offset,
            top_logprobs=top if isinstance(top, int) else 0,
        ),
        kept_tokens=None if replayed else kept,
        expected=tape.ids[kept:] if how.exact else (),
        skip_chars=tape.chars if replayed else cut.skip_chars,
    )
    if replayed:
        return Continuation(path, armed(body), seam, how.exact, 0)
    request = _request(fields, tape, kept, limit, chat=path == CHAT)
    if not how.exact:
        _carry_penalties(request, fields, tape.ids[:kept])
    return Continuation(COMPLETIONS, msgspec.json.encode(request), seam, how.exact, kept)


def finish(
    path: bytes, body: bytes, tape: Tape, policy: StreamFailover, *, context_tokens: int
) -> bytes:
    """Make the finish of a sampled stream that has all its tokens; empty if it lacks more.

    There is nothing left to generate, and nobody could generate the last token again. It ended for
    its length, unless its last token is one that stops it. Where that cannot be known, for stop
    strings and special tokens are not seen here, there is none; an exact stream is replayed.
    """
    if tape.refusal or not tape.first:
        return b""
    fields = _fields(body)
    how = manner(fields, policy)
    limit = _limit(fields, path, context_tokens - len(tape.prompt_ids))
    told = (len(tape.ids), 0)
    if isinstance(how, Refused) or how.exact or limit is None or limit > len(tape.ids):
        return b""
    if tape.cut() != told or fields.get("stop") or fields.get("skip_special_tokens") is False:
        return b""
    last = tape.ids[-1]
    stopped = last in (fields.get("stop_token_ids") or ())
    reason: dict[str, Any] = {
        "finish_reason": "stop" if stopped else "length",
        "stop_reason": last if stopped else None,
    }
    if path == CHAT:
        shown: dict[str, Any] = {"delta": {"content": ""}, "logprobs": None, **reason}
    else:
        shown = {"text": "", "logprobs": None, **reason, "prompt_token_ids": None}
    ids: list[int] | None = [] if tape.options.wants_ids else None
    choice: dict[str, Any] = {"index": 0, **shown, "token_ids": ids}
    identity = msgspec.structs.asdict(decode_identity(tape.first))
    return b"data: " + msgspec.json.encode({**identity, "choices": [choice]}) + END


def tail(body: bytes, tape: Tape) -> bytes:
    """Make the last events of a stream that was lost when its answer was whole already.

    There are none where the last one was delivered, and only the end of the chunks was not.
    """
    if tape.done:
        return b""
    options = _fields(body).get("stream_options")
    wanted = isinstance(options, dict) and cast("dict[str, object]", options).get("include_usage")
    if not wanted or tape.usage_told:
        return DONE + END
    prompt_tokens, produced = len(tape.prompt_ids), len(tape.ids)
    usage = {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + produced,
        "completion_tokens": produced,
    }
    identity = msgspec.structs.asdict(decode_identity(tape.first))
    chunk: dict[str, Any] = {**identity, "choices": [], "usage": usage}
    return b"data: " + msgspec.json.encode(chunk) + END + DONE + END


def _unsteady(tape: Tape, skip_chars: int, fields: Mapping[str, Any]) -> str:
    """Say what of a sampled stream would be sampled anew although the client has seen it."""
    if skip_chars:
        return "it is sampled without a seed, and broke off where its text cannot be cut"
    kept = tape.cut().kept_tokens
    told = tape.options.wants_ids or fields.get("logprobs") not in (None, False)
    if told and len(tape.ids) > kept:
        return "it is sampled without a seed, and broke off within a character"
    return ""


def _request(
    fields: Mapping[str, Any], tape: Tape, kept: int, limit: int | None, *, chat: bool
) -> dict[str, Any]:
    request = {name: value for name, value in fields.items() if name in CARRIED}
    request["prompt"] = [*tape.prompt_ids, *tape.ids[:kept]]
    request["stream"] = True
    request["return_token_ids"] = True
    request["max_tokens"] = None if limit is None else limit - kept
    least = fields.get("min_tokens")
    if isinstance(least, int) and least > kept:
        request["min_tokens"] = least - kept
    if chat and fields.get("logprobs"):
        request["logprobs"] = fields.get("top_logprobs") or 0
    elif not chat and fields.get("logprobs") is not None:
        request["logprobs"] = fields["logprobs"]
    return request


def _limit(fields: Mapping[str, Any], path: bytes, room_tokens: int) -> int | None:
    """Say how many tokens the whole answer may have; None: as many as the engine allows."""
    names = ("max_completion_tokens", "max_tokens") if path == CHAT else ("max_tokens",)
    for name in names:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    if path == COMPLETIONS and "max_tokens" not in fields:
        return DEFAULT_COMPLETION_TOKENS
    return room_tokens if room_tokens > 0 else None


def _carry_penalties(
    request: dict[str, Any], fields: Mapping[str, Any], ids: Sequence[int]
) -> None:
    """Hold against a sampled continuation's tokens what was generated before the seam.

    An engine counts only what it generates itself, so the penalties for earlier tokens become a
    bias. A token that comes again counts twice for its presence: another distribution by a little.
    """
    frequency = fields.get("frequency_penalty") or 0.0
    presence = fields.get("presence_penalty") or 0.0
    if not frequency and not presence:
        return
    bias = dict(cast("Mapping[str, float]", fields.get("logit_bias") or {}))
    counts: dict[int, int] = {}
    for token in ids:
        counts[token] = counts.get(token, 0) + 1
    for token, count in counts.items():
        bias[f"{token}"] = bias.get(f"{token}", 0.0) - frequency * count - presence
    request["logit_bias"] = bias
    request["frequency_penalty"] = frequency
    request["presence_penalty"] = presence


def _fields(body: bytes) -> dict[str, Any]:
    return msgspec.json.decode(body, type=dict[str, Any])
