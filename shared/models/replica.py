"""A replica: one engine process (or external server) that serves a model, and its states.

The table `TRANSITIONS` is law: the same table stands in `lua/lib/states.lua` and in the docs'
diagram, and a test keeps the three alike.
"""

from enum import StrEnum
from types import MappingProxyType
from typing import Final

import msgspec

from shared.models.deployment import EngineKind


class ReplicaState(StrEnum):
    """Where a replica stands in its life."""

    PENDING = "PENDING"
    """Recorded by the controller; its host has not begun."""
    STARTING = "STARTING"
    """The engine process runs but has not answered its warm-up yet."""
    READY = "READY"
    """Live, probed and warm: the only state that gets new requests."""
    UNHEALTHY = "UNHEALTHY"
    """Alive but failing its probes: no new requests; may become READY again."""
    DRAINING = "DRAINING"
    """No new requests; those in flight finish."""
    STOPPED = "STOPPED"
    """Ended as wanted."""
    FAILED = "FAILED"
    """Ended, or given up, against our will."""


TRANSITIONS: Final = MappingProxyType(
    {
        ReplicaState.PENDING: frozenset({ReplicaState.STARTING, ReplicaState.FAILED}),
        ReplicaState.STARTING: frozenset(
            {ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.FAILED}
        ),
        ReplicaState.READY: frozenset(
            {ReplicaState.UNHEALTHY, ReplicaState.DRAINING, ReplicaState.FAILED}
        ),
        ReplicaState.UNHEALTHY: frozenset(
            {ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.FAILED}
        ),
        ReplicaState.DRAINING: frozenset({ReplicaState.STOPPED, ReplicaState.FAILED}),
        ReplicaState.STOPPED: frozenset[ReplicaState](),
        ReplicaState.FAILED: frozenset[ReplicaState](),
    }
)
"""State → the states that may follow. Records are deleted only from STOPPED and FAILED."""

ENDED: Final = frozenset({ReplicaState.STOPPED, ReplicaState.FAILED})
"""States without a future."""


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """The record of one replica: field `<rid>` of its model's `replicas` hash."""

    rid: str
    model: str
    gen: int
    """Incarnation: minted at PENDING, only grows; a write of another incarnation is refused."""
    state: ReplicaState
    host: str
    revision: str
    kind: EngineKind = EngineKind.VLLM
    url: str = ""
    """Base URL, such as `http://10.0.0.5:18001`; known from STARTING on."""
    api_key_env: str | None = None
    """`external` only: which environment variable holds the upstream's API key."""
    capacity: float = 1.0
    """Relative throughput: a replica of capacity 2 gets twice the work."""
    max_requests: int = 256
    penalty: int = 0
    """Added to the score: an otherwise equal replica with a penalty is chosen later."""
    max_model_len_tokens: int = 0
    """Context length the engine itself reports; 0 while unknown."""
    since_ms: int = 0
    """When it entered its state (Redis time)."""
    ver: int = 0
    """Routing version of the last change."""
    reason: str = ""
    """Why it is in its state, for a person."""
    pid: int = 0
