"""A model's routing spec in Redis: what the leader tells the proxies about the model.

It is a plain hash, so that an operator can read it. The field `epoch` says that a leader has
written it since the data began; without it a snapshot is not authoritative.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec

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

_UNWRITTEN: Final = frozenset({"model", "epoch"})
"""The model stands in the key, and the script writes the epoch of who writes."""


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
        """Delete all keys but the fence of a model without replicas and reservations."""
        keys = self._keys.model(model)
        reply = await self._connection.evalsha(
            FORGET, keys.pick(FORGET.keys), (fence.epoch, fence.owner, keys.channel)
        )
        return _version(reply)


def spec_fields(spec: ModelSpec) -> dict[str, str]:
    """Write a routing spec as the fields of its hash: what `parse_spec` reads."""
    fields: dict[str, str] = {}
    for name in spec.__struct_fields__:
        value: object = getattr(spec, name)
        if name not in _UNWRITTEN:
            fields[name] = (
                msgspec.json.encode(value).decode() if isinstance(value, tuple) else str(value)
            )
    return fields


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
