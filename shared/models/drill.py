"""A drill's wish to one agent: strike one engine of this host, once, and only this incarnation.

It is not an order: orders say what the controller wants for good, and a drill wants a failure. An
agent looks for wishes only where its own settings permit drills.
"""

from enum import StrEnum

import msgspec


class DrillAct(StrEnum):
    """What the agent shall do to the engine."""

    KILL = "kill"
    """SIGKILL to its whole process group."""
    FREEZE = "freeze"
    """SIGSTOP, and SIGCONT when `hold_s` is over, whatever becomes of the drill."""
    THAW = "thaw"
    """SIGCONT before that."""


class DrillWish(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `drill:<host>`; it vanishes by itself when no agent takes it."""

    id: str
    """Names the drill in the event that answers it."""
    rid: str
    gen: int
    """The incarnation it is meant for: a later one is left alone."""
    act: DrillAct
    hold_s: float = 0.0
    by: str = ""


class Production(msgspec.Struct, frozen=True, kw_only=True):
    """An operator's mark: real users depend on this fleet, so drills ask twice."""

    since_ms: int
    by: str
    note: str = ""
