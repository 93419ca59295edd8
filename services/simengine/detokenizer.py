"""From token ids to text deltas, held back exactly where vLLM holds them back.

Two things delay text: a delta is shown only when everything so far is valid UTF-8 (so a prompt
that ends inside a character makes the first delta repeat the decoded prompt: a trap the real
engine has, kept here so that callers meet it in tests), and with stop strings the last
longest-stop-minus-one characters wait until it is known that no stop string begins in them.
"""

from collections.abc import Sequence

from services.simengine.text import TOKEN_BYTES, VISIBLE_BYTES, decode_bytes


class Detokenizer:
    """The visible text of one run. Call `push` per token, `take` for what may be shown."""

    __slots__ = (
        "_include_stop",
        "_lag_chars",
        "_min_tokens",
        "_pending",
        "_pushed",
        "_shown_chars",
        "_stops",
        "_table",
        "text",
    )

    def __init__(
        self,
        prompt_ids: Sequence[int],
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._table = VISIBLE_BYTES if skip_special else TOKEN_BYTES
        # The last character of UTF-8 is at most four bytes: only then is the prompt decoded whole.
        tail = decode_bytes(prompt_ids[-4:], special=not skip_special)
        whole = _decode(tail) if tail else ""
        self._pending = decode_bytes(prompt_ids, special=not skip_special) if whole is None else b""
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._lag_chars = max(map(len, stops)) - 1 if stops and not include_stop else 0
        self._min_tokens = min_tokens
        self._pushed = 0
        self._shown_chars = 0
        self.text = ""

    def push(self, token_id: int, *, silent: bool = False) -> str | None:
        """Append a token; return the stop string it completed, if any.

        `silent` is for a token that ends the run and is not part of its text.
        """
        self._pushed += 1
        if silent:
            return None
        raw = self._table[token_id]
        if self._pending:
            raw = self._pending + raw
        if not raw:
            return None
        fresh = _decode(raw)
        if fresh is None:
            self._pending = raw
            return None
        self._pending = b""
        self.text += fresh
        if self._stops and self._pushed > self._min_tokens:
            return self._find_stop(len(fresh))
        return None

    def take(self, *, finished: bool) -> str:
        """Return the text that may be shown now and was not yet; all of it when `finished`."""
        if not self._stops:  # nothing to look back at: keep nothing, so a long run stays cheap
            text, self.text = self.text, ""
            return text
        end = len(self.text) if finished else len(self.text) - self._lag_chars
        start = self._shown_chars
        if end <= start:
            return ""
        self._shown_chars = end
        return self.text[start:end]

    def _find_stop(self, fresh_chars: int) -> str | None:
        for stop in self._stops:
            start = max(0, len(self.text) - fresh_chars - len(stop) + 1)
            at = self.text.find(stop, start)
            if at >= 0:
                self.text = self.text[: at + len(stop) if self._include_stop else at]
                return stop
        return None


def _decode(raw: bytes) -> str | None:
    """Return the text of `raw`, or None while it ends in bytes that are no character (yet)."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("utf-8", "replace")
        return None if text.endswith("\ufffd") else text
