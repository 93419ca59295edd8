"""Every Redis key and channel of redmesh, built here and nowhere else.

All keys of one model share the hash tag `{<model>}`, all keys of the fleet the tag `{ctl}`, and
those of one resumable stream the tag `{s:<id>}`, so that each script's keys live in one slot of a
Redis Cluster. Names are checked before they come near a key: none can hold a brace. The tables here
are what `docs/redis.md` documents; a test keeps them alike.
"""

import re
from collections.abc import Iterable
from types import MappingProxyType
from typing import Final

from shared.errors import InvalidInputError
from shared.ids import check_name

MODEL_KEYS: Final = MappingProxyType(
    {
        "spec": "hash",
        "fence": "hash",
        "replicas": "hash",
        "ready": "zset",
        "weight": "hash",
        "cost": "hash",
        "nreq": "hash",
        "lease:<proxy>": "hash",
        "px": "zset",
        "suspect": "zset",
        "wait": "hash",
        "hb": "zset",
        "stat": "hash",
        "ver": "string",
    }
)
"""Suffix → type of the keys of one model."""

FLEET_KEYS: Final = MappingProxyType(
    {
        "leader": "hash",
        "epoch": "string",
        "deployments": "hash",
        "revisions": "hash",
        "forgotten": "hash",
        "hosts": "hash",
        "orders:<host>": "hash",
        "drill:<host>": "string",
        "members": "hash",
        "hb": "zset",
        "holds": "hash",
        "events": "stream",
        "production": "string",
        "schema": "string",
    }
)
"""Suffix → type of the keys of the fleet."""

STREAM_KEYS: Final = MappingProxyType({"meta": "hash", "tokens": "stream"})
"""Suffix → type of the keys of one resumable stream."""

EXPIRING_KEYS: Final = frozenset(
    {"{ctl}:leader", "{ctl}:drill:<host>", "{s:<id>}:meta", "{s:<id>}:tokens"}
)
"""Keys that must have a TTL; no other key has one."""

STREAM_ID: Final = re.compile(r"[0-9a-f]{32}")
"""The id of a resumable stream, matched in full: 128 bits that nobody guesses."""

PROXY_PART: Final = "lease:<proxy>"
HOST_PART: Final = "orders:<host>"


class ModelKeys:
    """The keys of one model."""

    __slots__ = (
        "channel",
        "cost",
        "fence",
        "hb",
        "model",
        "nreq",
        "prefix",
        "px",
        "ready",
        "replicas",
        "spec",
        "stat",
        "suspect",
        "ver",
        "wait",
        "weight",
    )

    def __init__(self, prefix: str, model: str) -> None:
        check_name("model", model)
        self.model = model
        self.prefix = f"{prefix}:{{{model}}}:"
        self.spec = self.prefix + "spec"
        self.fence = self.prefix + "fence"
        self.replicas = self.prefix + "replicas"
        self.ready = self.prefix + "ready"
        self.weight = self.prefix + "weight"
        self.cost = self.prefix + "cost"
        self.nreq = self.prefix + "nreq"
        self.px = self.prefix + "px"
        self.suspect = self.prefix + "suspect"
        self.wait = self.prefix + "wait"
        self.hb = self.prefix + "hb"
        self.stat = self.prefix + "stat"
        self.ver = self.prefix + "ver"
        self.channel = f"{prefix}:routes:{model}"

    def lease(self, proxy: str) -> str:
        """Name the hash of the reservations that `proxy` holds."""
        return f"{self.prefix}lease:{check_name('proxy', proxy)}"

    def pick(self, suffixes: Iterable[str], proxy: str = "") -> tuple[str, ...]:
        """Name the keys that a script declares, in its order."""
        return tuple(
            self.lease(proxy) if suffix == PROXY_PART else self.prefix + suffix
            for suffix in suffixes
        )


class FleetKeys:
    """The keys of the fleet as a whole."""

    __slots__ = (
        "deployments",
        "epoch",
        "events",
        "forgotten",
        "hb",
        "holds",
        "hosts",
        "leader",
        "members",
        "prefix",
        "production",
        "revisions",
        "schema",
    )

    def __init__(self, prefix: str) -> None:
        self.prefix = f"{prefix}:{{ctl}}:"
        self.leader = self.prefix + "leader"
        self.epoch = self.prefix + "epoch"
        self.deployments = self.prefix + "deployments"
        self.revisions = self.prefix + "revisions"
        self.forgotten = self.prefix + "forgotten"
        self.hosts = self.prefix + "hosts"
        self.members = self.prefix + "members"
        self.hb = self.prefix + "hb"
        self.holds = self.prefix + "holds"
        self.events = self.prefix + "events"
        self.production = self.prefix + "production"
        self.schema = self.prefix + "schema"

    def orders(self, host: str) -> str:
        """Name the hash of the orders to the agent of `host`."""
        return f"{self.prefix}orders:{check_name('host', host)}"

    def drill(self, host: str) -> str:
        """Name the string that holds a drill's wish to the agent of `host`."""
        return f"{self.prefix}drill:{check_name('host', host)}"

    def aside(self, key: str) -> str:
        """Name where foreign data go that stood in `key`: same slot, same prefix, nobody's key."""
        return (
            f"{self.prefix.removesuffix('{ctl}:')}foreign:{{ctl}}:{key.removeprefix(self.prefix)}"
        )

    def pick(self, suffixes: Iterable[str], host: str = "") -> tuple[str, ...]:
        """Name the keys that a script declares, in its order."""
        return tuple(
            self.orders(host) if suffix == HOST_PART else self.prefix + suffix
            for suffix in suffixes
        )


class StreamKeys:
    """The keys of one resumable stream."""

    __slots__ = ("meta", "prefix", "tokens")

    def __init__(self, prefix: str, stream: str) -> None:
        if not STREAM_ID.fullmatch(stream):
            raise InvalidInputError("a stream's id has 32 hexadecimal digits", field="stream")
        self.prefix = f"{prefix}:{{s:{stream}}}:"
        self.meta = self.prefix + "meta"
        self.tokens = self.prefix + "tokens"

    def pick(self, suffixes: Iterable[str]) -> tuple[str, ...]:
        """Name the keys that a script declares, in its order."""
        return tuple(self.prefix + suffix for suffix in suffixes)


class Keys:
    """All keys under one prefix. `routes_pattern` matches every routes channel."""

    __slots__ = ("_models", "fleet", "prefix", "routes_pattern")

    def __init__(self, prefix: str = "redmesh") -> None:
        self.prefix = check_name("key_prefix", prefix)
        self.fleet = FleetKeys(prefix)
        self.routes_pattern = f"{prefix}:routes:*"
        self._models: dict[str, ModelKeys] = {}

    def model(self, name: str) -> ModelKeys:
        """Give the keys of one model; raise `InvalidInputError` for a name that is none."""
        keys = self._models.get(name)
        if keys is None:
            keys = ModelKeys(self.prefix, name)
            self._models[name] = keys
        return keys

    def stream(self, stream: str) -> StreamKeys:
        """Give the keys of a resumable stream; raise `InvalidInputError` for an id that is none."""
        return StreamKeys(self.prefix, stream)

    def routes_channel(self, model: str) -> str:
        """Name the channel on which changes of this model's routes are hinted."""
        return self.model(model).channel
