"""Log probabilities in vLLM's shapes. The numbers are made up, and a pure function of the id."""

from collections.abc import Sequence

from services.simengine.text import SIZE, TOKEN_BYTES


def chat_logprobs(ids: Sequence[int], top: int) -> dict[str, object]:
    """Return the chat form: one entry per token with its `top` alternatives."""
    return {
        "content": [
            {**_entry(token), "top_logprobs": [_entry(other) for other in _best(token, top)]}
            for token in ids
        ]
    }


def completion_logprobs(ids: Sequence[int], top: int, offset: int) -> dict[str, object]:
    """Return the completions form; `offset` is where in the text the first token begins."""
    offsets: list[int] = []
    for token in ids:
        offsets.append(offset)
        offset += len(_text(token))
    return {
        "text_offset": offsets,
        "token_logprobs": [_value(token) for token in ids],
        "tokens": [_text(token) for token in ids],
        "top_logprobs": [
            {_text(other): _value(other) for other in _best(token, max(1, top))} for token in ids
        ],
    }


def text_chars(ids: Sequence[int]) -> int:
    """Count the characters of tokens, each decoded by itself, as offsets count them."""
    return sum(len(_text(token)) for token in ids)


def _entry(token: int) -> dict[str, object]:
    text = _text(token)
    # vLLM gives the bytes of the decoded token, not the token's own.
    return {"token": text, "logprob": _value(token), "bytes": list(text.encode())}


def _best(token: int, top: int) -> list[int]:
    return [(token + step) % SIZE for step in range(top)]


def _value(token: int) -> float:
    return -((token * 2654435761) % 65521) / 65521.0


def _text(token: int) -> str:
    return TOKEN_BYTES[token].decode("utf-8", "replace")
