"""The bytes of a trace's prompts: a block's name, again and again, in the shape of a chat request.

Text has between three and five bytes a token, so the proxy's estimate of four is wrong for most
conversations, as it is in life.
"""

from typing import Final

from tests.routing.traces import BLOCK_TOKENS, Arrival

BEFORE: Final = b'[{"role":"user","content":"'
AFTER: Final = b'"}]'


def prompt_of(arrival: Arrival) -> bytes:
    """Write the messages of a request; what begins alike in tokens begins alike in bytes."""
    first = arrival.blocks[0]
    block_bytes = BLOCK_TOKENS * (6 + first % 5) // 2
    parts = [BEFORE]
    for block in arrival.blocks:
        word = b"%016x" % (block * 0x9E3779B97F4A7C15 % (1 << 64))
        parts.append((word * (block_bytes // 16 + 1))[:block_bytes])
    cut = (len(arrival.blocks) * BLOCK_TOKENS - arrival.input_tokens) * block_bytes // BLOCK_TOKENS
    if cut:
        parts[-1] = parts[-1][:-cut]
    parts.append(AFTER)
    return b"".join(parts)
