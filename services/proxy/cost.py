"""What a request will cost a replica, in tokens, before anybody has counted them.

A cost is the prompt (estimated from its bytes: no tokenizer runs in the proxy) plus the output
that is expected: the client's own bound, itself bounded by what this model's answers have been
like lately. Estimates need to be comparable between requests, not right. Everything here is pure.
"""

from typing import Final

BYTES_PER_TOKEN: Final = 4
DEFAULT_OUTPUT_TOKENS: Final = 256
MAX_COST_TOKENS: Final = 1_000_000_000
_SMOOTHING: Final = 0.05
_HEADROOM: Final = 2.0


def prompt_tokens(raw: bytes) -> int:
    """Estimate the tokens of a raw JSON prompt, messages or input value.

    A list of token ids (or of such lists) counts its numbers; anything else its bytes.
    """
    if not raw:
        return 1
    inner = raw[:64].lstrip(b"[ \t\r\n")
    if raw[:1] == b"[" and inner[:1].isdigit():
        return raw.count(b",") + 1
    return len(raw) // BYTES_PER_TOKEN + 1


class OutputEstimate:
    """Running estimate of how many tokens an answer of one model has."""

    __slots__ = ("_mean_tokens", "_usual_tokens")

    def __init__(self) -> None:
        self._mean_tokens = float(DEFAULT_OUTPUT_TOKENS)
        self._usual_tokens = round(DEFAULT_OUTPUT_TOKENS * _HEADROOM)

    def observe(self, tokens: int) -> None:
        """Learn from one complete answer."""
        self._mean_tokens += _SMOOTHING * (tokens - self._mean_tokens)
        self._usual_tokens = max(1, round(self._mean_tokens * _HEADROOM))

    def expect(self, client_limit_tokens: int | None, choices: int = 1) -> int:
        """Return the output to reserve for, given the client's bound (None: it gave none)."""
        each = self._usual_tokens
        if client_limit_tokens is not None and client_limit_tokens < each:
            each = max(1, client_limit_tokens)
        return min(MAX_COST_TOKENS, each * max(1, choices))
