"""Foreign text in our own words: cut to what a person reads, however long and how many it is."""

import heapq
from collections.abc import Collection


def short(text: str) -> str:
    """Cut `text` to 40 characters."""
    return text if len(text) <= 40 else text[:40] + "…"


def listed(names: Collection[str], most: int = 5) -> str:
    """Quote the first few of `names`, in order, and say how many more there are."""
    first = heapq.nsmallest(most, names)
    quoted = ", ".join(repr(short(name)) for name in first)
    others = len(names) - len(first)
    return f"{quoted} and {others} more" if others else quoted
