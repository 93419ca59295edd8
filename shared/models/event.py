"""Events: what happened, in words an operator understands, kept in a capped stream."""

from enum import StrEnum

import msgspec


class EventLevel(StrEnum):
    """How much an operator should care."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the fleet's `events` stream."""

    kind: str
    """CamelCase reason, stable for filters: `ReplicaFailed`, `LeaderElected`, …"""
    subject: str
    """`deployment/<model>`, `replica/<rid>`, `host/<host>`, `controller/<id>`, `proxy/<id>`."""
    message: str
    level: EventLevel = EventLevel.INFO
    source: str = ""
    """Who says so: `controller/<id>`, `agent/<host>`, `cli`."""
    at_ms: int = 0
    """0 while not stored, if it is when it is stored that counts."""
    id: str = ""
    """Stream id; empty until stored."""
