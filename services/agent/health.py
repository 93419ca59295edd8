"""When is an engine well? Pure rules over what probes saw; time is an argument, in seconds.

An engine that produces tokens is well: a probe would only add to its load. One that stands still
must show that it can produce one token. `/health` proves nothing here: vLLM answers 200 there
while its engine core is frozen.
"""

from typing import Final

import msgspec


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What the probes so far amount to."""

    healthy: bool = True
    misses: int = 0
    """Misses in a row."""
    progress: float = -1.0
    """The engine's own count of tokens when last judged; -1 while unknown."""
    due_s: float = 0.0
    """When the next judgement is due."""


RETRY_S: Final = 1.0
"""After a miss the next probe follows soon: a frozen engine must be known within seconds."""


def progressed(health: Health, progress: float) -> bool:
    """Tell whether the engine has worked on tokens since it was last judged.

    A count that went down is a new engine's: it says nothing yet.
    """
    return 0 <= health.progress < progress


def judge(
    health: Health, *, well: bool, progress: float, now_s: float, interval_s: float, misses: int
) -> Health:
    """Take a judgement into account: `misses` in a row end the health, one success mends it."""
    if well:
        return Health(healthy=True, progress=progress, due_s=now_s + interval_s)
    missed = health.misses + 1
    return Health(
        healthy=health.healthy and missed < misses,
        misses=missed,
        progress=progress,
        due_s=now_s + min(RETRY_S, interval_s),
    )
