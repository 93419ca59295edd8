"""What a journal keeps of a tape, so that another proxy can make the same tape again."""

from typing import Annotated

import msgspec

from services.proxy.continuation.chunks import MAX_ID, Identity

TokenId = Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
"""A journal with anything else is foreign, and does not parse."""


class Memo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What has changed on a tape since the memo before."""

    kept: int
    """Token ids known before that stay; those beyond were sampled anew."""
    ids: list[TokenId]
    """Token ids that follow them."""
    chars: int
    """Characters delivered so far."""
    marks: list[tuple[int, int]]
    """Where the stream may be cut: generated tokens and characters."""
    next_offset: int = 0
    finished: bool = False
    refusal: str = ""
    failovers: int = 0
    """How often the stream has lost its replica and gone on elsewhere."""
    prompt_ids: list[TokenId] | None = None
    """In the first memo: the prompt."""
    identity: Identity | None = None
    """In the first memo: who the stream is."""
