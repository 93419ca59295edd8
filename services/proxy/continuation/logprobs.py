"""Log probabilities of a completion, cut and turned into a chat's.

A completion lists tokens, their log probabilities, and for each the most likely ones as a map,
the sampled one first; a chat lists one object for each token. Shapes: OpenAI's API reference, as
vLLM 0.32 fills it. Two likely tokens with the same text are one entry of a completion's map, so a
chat's list may be shorter by them after a seam.
"""

from typing import Any, cast

LEAST = -9999.0
"""What vLLM says for a token without a log probability."""


def sliced(logprobs: dict[str, Any], start: int) -> dict[str, Any]:
    """Leave out the first `start` tokens."""
    lists = cast("dict[str, list[Any] | None]", logprobs)
    return {name: values[start:] if values else values for name, values in lists.items()}


def as_chat(logprobs: dict[str, Any], top: int) -> dict[str, Any]:
    """Turn a completion's log probabilities into a chat's with `top` likely tokens each."""
    likely = cast("list[dict[str, float] | None]", logprobs["top_logprobs"])
    return {
        "content": [
            {
                **_entry(token, logprob),
                "top_logprobs": [
                    _entry(other, value) for other, value in list((most or {}).items())[:top]
                ],
            }
            for token, logprob, most in zip(
                logprobs["tokens"], logprobs["token_logprobs"], likely, strict=True
            )
        ]
    }


def _entry(token: str, logprob: float | None) -> dict[str, Any]:
    return {
        "token": token,
        "logprob": LEAST if logprob is None else logprob,
        "bytes": list(token.encode("utf-8", errors="replace")),
    }
