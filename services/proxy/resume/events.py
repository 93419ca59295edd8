"""Numbered server-sent events: given their numbers, and found by them. Pure."""

from typing import Final

END: Final = b"\n\n"


def numbered(events: bytes, last: int) -> tuple[bytes, int]:
    """Give whole `events` the numbers after `last`; return them and the new last number."""
    parts: list[bytes] = []
    for event in events.split(END):
        if event:
            last += 1
            parts.append(b"id: %d\n%s\n\n" % (last, event))
    return b"".join(parts), last


def after(events: bytes, first: int, seen: int) -> tuple[bytes, int]:
    """Leave out what is not beyond event `seen` of numbered `events` that begin with `first`.

    Returns the rest and the number of the last event.
    """
    last = first + events.count(END) - 1
    known = seen - first + 1
    if known <= 0:
        return events, last
    return END.join(events.split(END)[known:]), max(seen, last)


def event_number(given: bytes) -> int | None:
    """Read a `Last-Event-ID`; None if it is no number of ours."""
    return int(given) if given.isdigit() and len(given) <= 15 else None
