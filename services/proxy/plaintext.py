"""Turning a stream of chat chunks into the text they carry, for `text/plain` requests.

Reads server-sent events as they come, in pieces cut anywhere (also inside a character), and gives
the text of each. Knows whether the stream ended well: a finish reason was seen, no error was.
"""

from typing import Final

import msgspec

DONE: Final = b"[DONE]"


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _ErrorBody(msgspec.Struct):
    message: str = ""


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    error: _ErrorBody | None = None


class TextStream:
    """Incremental reader of one stream."""

    __slots__ = ("_decoder", "_pending", "error", "finished")

    def __init__(self) -> None:
        self._pending = b""
        self._decoder = msgspec.json.Decoder(_Chunk)
        self.finished = False
        """A finish reason was seen: the text is whole."""
        self.error = ""
        """What the stream said went wrong; empty if nothing did."""

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes of the stream; return the text they complete, in UTF-8."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        text: list[str] = []
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), text)
        return "".join(text).encode()

    def _event(self, payload: bytes, text: list[str]) -> None:
        if payload == DONE or not payload:
            return
        try:
            chunk = self._decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.error = f"the replica sent a chunk that does not parse: {error}"
            return
        if chunk.error is not None:
            self.error = chunk.error.message or "the replica reported an error"
            return
        for choice in chunk.choices:
            if choice.delta.content:
                text.append(choice.delta.content)
            if choice.finish_reason is not None:
                self.finished = True
