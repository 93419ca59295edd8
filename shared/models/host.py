"""Hosts, and the members of the fleet: what each process says of itself."""

from enum import StrEnum

import msgspec


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU of a host."""

    index: int
    uuid: str
    name: str
    memory_bytes: int


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent found on its host: field `<host>` of the fleet's `hosts` hash."""

    host: str
    address: str
    """Where proxies reach this host's replicas: an IP address or a DNS name."""
    cpus: float
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    engines: tuple[str, ...] = ("sim", "external")
    """Engine kinds this host can run: `vllm` only where an engine environment exists."""
    max_replicas: int = 64
    labels: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    agent_started_ms: int = 0
    drills_allowed: bool = False
    """Its agent kills and freezes engines when a drill wishes so."""


class MemberKind(StrEnum):
    """What a member of the fleet is."""

    PROXY = "proxy"
    CONTROLLER = "controller"
    AGENT = "agent"


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One running service process: field `<kind>:<id>` of the fleet's `members` hash."""

    kind: MemberKind
    id: str
    host: str
    pid: int
    version: str
    started_ms: int
    url: str = ""
    """Where clients reach it (proxies)."""
    admin_url: str = ""
    """Health, metrics and live tables; loopback unless configured otherwise."""

    @property
    def field(self) -> str:
        """Name this member in the `members` hash and in the `hb` zset."""
        return f"{self.kind}:{self.id}"


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """An operator's wish to keep work away: field `host:<h>` or `replica:<rid>` of `holds`."""

    subject: str
    drain: bool
    """False: cordon only (no new placements). True: also move away what runs there."""
    since_ms: int
    by: str = ""
