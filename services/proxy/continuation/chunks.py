"""The chunks of an engine's stream, as far as they must be understood on their way.

Only what a tape needs is decoded; everything else is skipped by the parser. Shapes: vLLM 0.32's
`ChatCompletionStreamResponse` and `CompletionStreamResponse` with `return_token_ids`.
"""

from typing import Any, Final

import msgspec

MAX_ID: Final = 0xFFFF_FFFF
"""The largest token id: 32 bits hold every vocabulary."""


class Delta(msgspec.Struct, gc=False):
    """What a chat chunk adds to the message."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None


class Choice(msgspec.Struct, gc=False):
    """The one choice of a chunk: a chat's has a `delta`, a completion's has `text`."""

    delta: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Chunk(msgspec.Struct, gc=False):
    """One event of a stream."""

    choices: list[Choice] = []
    prompt_token_ids: list[int] | None = None
    error: Any = None


class Identity(msgspec.Struct, gc=False):
    """What stays the same in every chunk of a stream."""

    id: str = ""
    object: str = ""
    created: int = 0
    model: str = ""


class LogprobsOnly(msgspec.Struct, gc=False):
    """A completion's log probabilities: where the text of its next token will begin."""

    class One(msgspec.Struct, gc=False):
        """The one choice."""

        class Of(msgspec.Struct, gc=False):
            """Its log probabilities."""

            text_offset: list[int] = []
            tokens: list[str] = []

        logprobs: Of | None = None

    choices: list[One] = []


decode_chunk: Final = msgspec.json.Decoder(Chunk).decode
decode_identity: Final = msgspec.json.Decoder(Identity).decode
decode_logprobs: Final = msgspec.json.Decoder(LogprobsOnly).decode


def error_text(error: object) -> str:
    """Say what an error event says, whatever its shape."""
    if isinstance(error, dict):
        message: object = error.get("message")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - foreign JSON
        if isinstance(message, str) and message:
            return message
    return error if isinstance(error, str) and error else "the replica reported an error"
