"""Digests of a prompt's beginning: equal leading bytes give equal leading digests.

Engines keep what they computed of a prompt, and compute only what differs from its beginning on. To
know which prompts begin alike, a proxy needs neither their text nor a tokenizer: it sums their
bytes at fixed places, each some quarter further than the last. So a prompt of 2 KB has four
digests, one of 100 KB has 21, and the places of two prompts that begin alike are the same.

A digest is a CRC-32 with its place: the same in every process (Python's own hash is not), at about
a nanosecond a byte. Two prompts that collide are sent to the same replica, and nothing else.
"""

from typing import Final, NamedTuple
from zlib import crc32

FIRST_CUT_BYTES: Final = 1024
"""Shorter prompts have no digests: what a cache would save of them is a few milliseconds."""
LAST_CUT_BYTES: Final = 1 << 20
"""What comes later in a prompt is not looked at."""


def _cuts() -> tuple[int, ...]:
    """Place the cuts: each a quarter further than the last, in steps of 64 bytes."""
    cuts = [FIRST_CUT_BYTES]
    while cuts[-1] < LAST_CUT_BYTES:
        cuts.append(cuts[-1] * 5 // 4 // 64 * 64)
    return tuple(cuts)


CUTS: Final = _cuts()


class Prefix(NamedTuple):
    """What is known of a prompt's beginning."""

    digests: tuple[int, ...]
    """One per place of `CUTS` that the prompt reaches."""
    size_bytes: int
    """Bytes of the whole prompt."""


NO_PREFIX: Final = Prefix((), 0)


def prefix_of(prompt: bytes, before: bytes = b"") -> Prefix:
    """Digest the beginning of a prompt; `before` is what the engine puts in front of it."""
    size_bytes = len(prompt)
    if size_bytes < FIRST_CUT_BYTES:
        return NO_PREFIX
    value = crc32(before) if before else 0
    digests: list[int] = []
    view = memoryview(prompt)
    begin = 0
    for place, end in enumerate(CUTS):
        if end > size_bytes:
            break
        value = crc32(view[begin:end], value)
        digests.append(value << 6 | place)
        begin = end
    return Prefix(tuple(digests), size_bytes)
