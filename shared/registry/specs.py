"""A model's routing spec in Redis: what the leader tells the proxies about the model.

It is a plain hash, so that an operator can read it. The field `epoch` says that a leader has
written it since the data began; without it a snapshot is not authoritative.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from shared.models.deployment import Deployment
from shared.models.routing import ModelSpec
from shared.registry.connection import Argument, Connection
from shared.registry.keys import Keys
from shared.registry.loader import ScriptSpec
from shared.registry.results import Fence, Refused, refused, whole_number

WRITE: Final = ScriptSpec("spec/write", "M", ("fence", "spec", "ver"), ("OK", "FENCED"))
FORGET: Final = ScriptSpec(
    "spec/forget",
    "M",
    (
        "fence",
        "spec",
        "ver",
        "replicas",
        "ready",
        "weight",
        "cost",
        "nreq",
        "px",
        "suspect",
        "wait",
        "hb",
        "stat",
    ),
    ("OK", "FENCED", "CONFLICT"),
)


class Specs:
    """The routing specs of every model."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys

    async def write(self, fence: Fence, model: str, fields: Mapping[str, str]) -> int | Refused:
        """Replace the model's spec; returns the routing version. The same fields change nothing."""
        keys = self._keys.model(model)
        args: list[Argument] = [fence.epoch, fence.owner, keys.channel]
        for field, value in fields.items():
            args += (field, value)
        reply = await self._connection.evalsha(WRITE, keys.pick(WRITE.keys), args)
        return _version(reply)

    async def raise_fence(self, fence: Fence, model: str) -> int | Refused:
        """Shut out every lower epoch from this model, and change nothing else."""
        return await self.write(fence, model, {})

    async def forget(self, fence: Fence, model: str) -> int | Refused:
        """Delete all keys of a model without replicas and reservations, for good."""
        keys = self._keys.model(model)
        reply = await self._connection.evalsha(
            FORGET, keys.pick(FORGET.keys), (fence.epoch, fence.owner, keys.channel)
        )
        return _version(reply)


def spec_fields(deployment: Deployment) -> dict[str, str]:
    """Write what proxies need of a deployment as fields of the spec hash."""
    spec = deployment.spec
    values: dict[str, object] = {
        "aliases": msgspec.json.encode(spec.aliases).decode(),
        "runner": spec.engine.runner,
        "generation": deployment.generation,
        "desired_replicas": deployment.replicas,
        "max_requests": spec.routing.max_requests,
        "request_timeout_s": spec.routing.request_timeout_s,
        "inter_byte_timeout_s": spec.routing.inter_byte_timeout_s,
        "affinity_absolute": spec.routing.affinity_absolute,
        "affinity_relative": spec.routing.affinity_relative,
        "max_model_len_tokens": spec.engine.max_model_len_tokens or 0,
        "created_ms": deployment.updated_ms,
    }
    return {field: str(value) for field, value in values.items()}


def parse_spec(model: str, fields: Mapping[str, str]) -> ModelSpec:
    """Read the spec hash; a field that does not parse keeps its default."""
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(ModelSpec):
        text = fields.get(field.name)
        if text is None or field.name == "model":
            continue
        try:
            raw: object = msgspec.json.decode(text) if field.name == "aliases" else text
            value = msgspec.convert(raw, type=field.type, strict=False)
        except (msgspec.DecodeError, ValueError):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            continue
        values[field.name] = value
    return ModelSpec(model=model, **values)


def _version(reply: list[Any]) -> int | Refused:
    return whole_number(reply[1]) if reply[0] == b"OK" else refused(reply)
