"""Orders: what the controller wants of one host, level-triggered and idempotent."""

from enum import StrEnum

import msgspec

from shared.models.deployment import DeploymentSpec


class OrderAction(StrEnum):
    """What the agent shall see to."""

    RUN = "run"
    """Keep this replica's engine running."""
    DRAIN = "drain"
    """The replica is DRAINING: once nothing is in flight, or the deadline is over, stop it."""
    STOP = "stop"
    """Stop the engine now (SIGTERM with its shutdown timeout, then SIGKILL)."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One order: field `<rid>` of `orders:<host>`.

    The absence of an order never stops an engine: an empty Redis must not kill what runs.
    """

    rid: str
    model: str
    gen: int
    action: OrderAction
    revision: str
    spec: DeploymentSpec
    url: str = ""
    """`external` only: the server this replica stands for."""
    gpu_indices: tuple[int, ...] = ()
    drain_timeout_s: float = 180.0
    issued_ms: int = 0
