"""Making one replica's chunks go on where another's broke off.

A seam knows the stream as the client has seen it: its identity, its shape, and what was delivered
beyond the point from which the replica goes on. Each chunk is checked against that, loses what
the client has already, and is dressed as the first replica's: same id, model and time; a
completion's chunk as a chat's where the request was a chat; usage as if undisturbed.

This is the rare path: clarity before speed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import msgspec

from services.proxy.continuation.chunks import Identity, decode_chunk, error_text
from services.proxy.continuation.logprobs import as_chat, sliced

MISMATCH = "another replica did not repeat what had been delivered"


class Turned(NamedTuple):
    """One chunk of a continuation, turned."""

    payload: bytes = b""
    """What goes to the client; empty if it has all of it already."""
    ids: Sequence[int] = ()
    """Token ids that are new."""
    text: str = ""
    """Text that is new."""
    whole: bool = False
    """The tokens up to here end with a character (as far as can be told)."""
    finished: bool = False
    usage: bool = False
    """It tells the usage of the whole answer."""
    next_offset: int = 0
    error: str = ""


class Seen(NamedTuple):
    """The stream as its client has seen it."""

    identity: Identity
    chat: bool
    prompt_tokens: int
    wants_ids: bool
    """The client asked for token ids itself."""
    next_offset: int
    top_logprobs: int


class Seam:
    """One continuation of one stream. `turn` takes its chunks in order.

    `kept_tokens` is what the replica was given of the answer, None for a replay; `expected` are the
    ids that it must generate again, and `skip_chars` the characters of its text that are known.
    """

    def __init__(
        self,
        seen: Seen,
        *,
        kept_tokens: int | None,
        expected: Sequence[int],
        skip_chars: int,
    ) -> None:
        self._seen = seen
        self._kept_tokens = kept_tokens
        self._expected = expected
        self._at = 0
        """How many of the expected ids have come again."""
        self._skip_chars = skip_chars
        self._next_offset = seen.next_offset

    def turn(self, payload: bytes) -> Turned:
        """Turn one chunk; an `error` in the result says why the stream cannot go on so."""
        try:
            decode_chunk(payload)  # it has the shape that is relied on below
            return self._turn(msgspec.json.decode(payload, type=dict[str, Any]))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return Turned(error=f"the replica sent a chunk that does not parse: {error}")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            # Log probabilities and usage have many shapes; whatever these are, they are none.
            return Turned(error=f"the replica sent a chunk that makes no sense: {error}")

    def _turn(self, chunk: dict[str, Any]) -> Turned:
        if chunk.get("error") is not None:
            return Turned(error=error_text(chunk["error"]))
        self._dress(chunk)
        choices = chunk.get("choices")
        if not choices:
            return self._turned(payload=msgspec.json.encode(chunk), usage=True)
        return self._turn_choice(chunk, cast("dict[str, Any]", choices[0]))

    def _turn_choice(self, chunk: dict[str, Any], choice: dict[str, Any]) -> Turned:
        ids = cast("list[int]", choice.get("token_ids") or [])
        repeated = min(len(ids), len(self._expected) - self._at)
        known = list(self._expected[self._at : self._at + repeated])
        self._at += repeated
        said = _text_of(choice)
        skipped = min(len(said), self._skip_chars)
        self._skip_chars -= skipped
        finish = choice.get("finish_reason")
        behind = self._skip_chars > 0 or self._at < len(self._expected)
        if ids[:repeated] != known or (finish is not None and behind):
            return Turned(error=MISMATCH)
        fresh, text = ids[repeated:], said[skipped:]
        logprobs = self._logprobs(choice.get("logprobs"), repeated)
        if not text and not fresh and finish is None:
            return self._turned()
        shape = self._chat_choice if self._seen.chat else self._completion_choice
        chunk["choices"] = [shape(choice, text, fresh, logprobs)]
        return self._turned(
            payload=msgspec.json.encode(chunk),
            ids=fresh,
            text=text,
            whole=bool(text) and len(ids) == 1,
            finished=finish is not None,
        )

    def _turned(self, **fields: Any) -> Turned:  # noqa: ANN401 - the fields of Turned
        return Turned(next_offset=self._next_offset, **fields)

    def _dress(self, chunk: dict[str, Any]) -> None:
        identity = self._seen.identity
        chunk["id"] = identity.id
        chunk["object"] = identity.object
        chunk["created"] = identity.created
        chunk["model"] = identity.model
        for name in ("prompt_token_ids", "prompt_text"):
            chunk.pop(name, None)  # they stood in the stream's first chunk
        usage = chunk.get("usage")
        if usage is None:
            chunk.pop("usage", None)  # a completion's chunk may have the key where a chat's has not
        if isinstance(usage, dict) and self._kept_tokens is not None:
            prompt_tokens = self._seen.prompt_tokens
            counts = cast("dict[str, Any]", usage)
            if self._seen.chat and chunk.get("choices"):
                # Where usage runs along, a chat's chunks have this key and a completion's have not.
                counts.setdefault("completion_tokens_details", None)
            produced = self._kept_tokens + int(counts.get("completion_tokens") or 0)
            counts["prompt_tokens"] = prompt_tokens
            counts["completion_tokens"] = produced
            counts["total_tokens"] = prompt_tokens + produced
            details = counts.get("prompt_tokens_details")
            if isinstance(details, dict):
                known = cast("dict[str, Any]", details)
                cached = int(known.get("cached_tokens") or 0)
                known["cached_tokens"] = min(cached, prompt_tokens)

    def _logprobs(self, given: object, repeated: int) -> object:
        """Leave out what was told of repeated tokens, and count offsets on from what was told."""
        if not isinstance(given, dict):
            return given
        logprobs = cast("dict[str, Any]", given)
        if "content" in logprobs:
            return {"content": logprobs["content"][repeated:]}
        tokens = cast("list[str]", logprobs.get("tokens") or [])
        offsets = cast("list[int]", logprobs.get("text_offset") or [])
        fresh = sliced(logprobs, repeated)
        if len(tokens) > repeated:
            shift = self._next_offset - offsets[repeated]
            fresh["text_offset"] = [offset + shift for offset in fresh["text_offset"]]
            self._next_offset = fresh["text_offset"][-1] + len(tokens[-1])
        return as_chat(fresh, self._seen.top_logprobs) if self._seen.chat else fresh

    def _chat_choice(
        self, choice: dict[str, Any], text: str, ids: list[int], logprobs: object
    ) -> dict[str, Any]:
        finish = choice.get("finish_reason")
        turned: dict[str, Any] = {
            "index": 0,
            "delta": {"content": text},
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        if finish is not None:
            turned["stop_reason"] = choice.get("stop_reason")
        turned["token_ids"] = ids if self._seen.wants_ids else None
        return turned

    def _completion_choice(
        self, choice: dict[str, Any], text: str, ids: list[int], logprobs: object
    ) -> dict[str, Any]:
        return {
            "index": 0,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.get("finish_reason"),
            "stop_reason": choice.get("stop_reason"),
            "prompt_token_ids": None,
            "token_ids": ids if self._seen.wants_ids else None,
        }


def _text_of(choice: dict[str, Any]) -> str:
    delta = choice.get("delta")
    said: object = (
        cast("dict[str, Any]", delta).get("content")
        if isinstance(delta, dict)
        else choice.get("text")
    )
    return said if isinstance(said, str) else ""
