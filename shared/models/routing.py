"""What a proxy must know of a model: its routing spec and its replicas, at one version."""

import msgspec

from shared.models.deployment import StreamFailover
from shared.models.replica import Replica


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A model's `spec` hash, parsed. Without `epoch` a snapshot is not authoritative."""

    model: str
    aliases: tuple[str, ...] = ()
    runner: str = "generate"
    generation: int = 0
    desired_replicas: int = 0
    max_requests: int = 100_000
    request_timeout_s: float = 600.0
    inter_byte_timeout_s: float = 120.0
    stream_failover: StreamFailover = StreamFailover.VALID
    prefix_affinity: bool = True
    affinity_absolute: int = 0
    affinity_relative: float = 1.0
    max_model_len_tokens: int = 0
    created_ms: int = 0
    epoch: int | None = None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything routing needs of one model, read in one atomic step."""

    model: str
    ver: int
    spec: ModelSpec
    replicas: dict[str, Replica]
    corrupt: tuple[str, ...] = ()
    """Replica ids whose records did not parse: left out, to be reported."""

    @property
    def authoritative(self) -> bool:
        """Tell whether a leader has written this model's spec since the data began."""
        return self.spec.epoch is not None


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """What a proxy's beat learns."""

    leases: int
    """Reservations Redis holds for this proxy and model."""
    ver: int
    known: bool
    """False: the proxy had been reaped (or the data is new); it must re-adopt what it relays."""
    waiting_total: int
    silent: int
    """Proxies of this model that have not beaten for longer than the allowed silence."""


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """One reservation as stored: field `<request>` of `lease:<proxy>`."""

    request: str
    rid: str
    cost_tokens: int
