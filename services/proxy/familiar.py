"""Heads of messages that have been read before, byte for byte but for the length of the body.

Who keeps a connection says nearly the same head again and again: a client with every request, a
replica with every answer of a second. To recognise it takes two comparisons, where a parser takes a
callback for each header. Only a head that the parser has read, and in one piece, is ever
remembered, so nothing is taken here that it would refuse; whatever differs goes to the parser.
"""

import re
from typing import Final

END: Final = b"\r\n\r\n"
MAX_BYTES: Final = 4096
"""A longer head is not remembered."""
MAX_DIGITS: Final = 12
_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)", re.IGNORECASE)


class FamiliarHead:
    """A head with the length of the body left out."""

    __slots__ = ("_after", "_after_bytes", "_before", "_before_bytes")

    def __init__(self, before: bytes, after: bytes) -> None:
        self._before = before
        self._after = after
        self._before_bytes = len(before)
        self._after_bytes = len(after)

    def body_of(self, message: bytes) -> bytes | None:
        """Give the body of a message with this head that is whole and alone; None of any other."""
        if not message.startswith(self._before):
            return None
        end = message.find(END, self._before_bytes) + 4
        length_end = end - self._after_bytes
        digits = message[self._before_bytes : length_end]
        if (
            not digits.isdigit()
            or len(digits) > MAX_DIGITS
            or not message.startswith(self._after, length_end)
            or end + int(digits) != len(message)
        ):
            return None
        return message[end:]


def familiar(head: bytes) -> FamiliarHead | None:
    """Remember a head that gives its body's length once, with all that ends it; None of others."""
    if len(head) > MAX_BYTES or not head.endswith(END):
        return None
    lengths = list(_LENGTH.finditer(head))
    if len(lengths) != 1:
        return None
    start, stop = lengths[0].span(1)
    return FamiliarHead(head[:start], head[stop:])
