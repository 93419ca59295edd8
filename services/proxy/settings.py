"""What a proxy can be told, by environment (`REDMESH_<FIELD>`) or flag."""

from shared.settings import CommonSettings


class ProxySettings(CommonSettings, frozen=True, kw_only=True):
    """Settings of one proxy process."""

    host: str = "127.0.0.1"
    """Address the public port binds; loopback unless told otherwise."""
    port: int = 8000
    """Public port; 0 takes any free one."""
    admin_host: str = "127.0.0.1"
    """Address the admin port binds (health, metrics, live requests)."""
    admin_port: int = 0
    """Admin port; 0 takes any free one."""
    workers: int = 1
    """Worker processes that share the public port; at most one for each core."""
    proxy_name: str = ""
    """Name of this proxy; empty: `px-<host>-<port>`. A random suffix is always added."""
    state_dir: str = ""
    """Where the routing table is kept for a restart while Redis is away; empty: not kept."""
    max_body_bytes: int = 32 << 20
    """Largest request body; above it the answer is 413."""
    max_header_bytes: int = 64 << 10
    """Largest request head; above it the answer is 431."""
    header_timeout_s: float = 15.0
    """A client gets this long to send the head of a request, from connecting on."""
    body_timeout_s: float = 60.0
    """A client gets this long to send the body of a request."""
    client_stall_timeout_s: float = 300.0
    """A client that takes nothing of its answer for this long is disconnected."""
    client_keep_alive_s: int = 75
    """An idle client connection is closed after this long."""
    connect_timeout_s: float = 5.0
    """Deadline for connecting to a replica."""
    replica_idle_s: float = 3.0
    """An idle connection to a replica is not used again after this long; keep it below the
    engine's own keep-alive (5 s), or requests meet connections that are being closed."""
    hold_timeout_s: float = 120.0
    """A request for a model without a usable replica waits this long for one (at most the
    model's `request_timeout_s`)."""
    busy_timeout_s: float = 10.0
    """A request for a model whose replicas are all full waits this long before 429."""
    max_held_requests: int = 4096
    """Requests that may wait per model in this proxy; above it the answer is 429 at once."""
    carrier: bool = True
    """Carry the usual tokens of streams in compiled code, if it was built; else all in Python."""
    max_tries: int = 3
    """Replicas that one request may be sent to."""
    drain_delay_s: float = 0.5
    """Between failing readiness and refusing new connections, on SIGTERM."""
    drain_timeout_s: float = 60.0
    """Answers in progress get this long to finish on SIGTERM. For half of it who is connected may
    still ask, then gets 503. A second signal ends the wait."""
    resumable_bytes: int = 4 << 20
    """Largest journal of a resumable stream in Redis; beyond it the stream goes on, but can no
    longer be resumed."""
    resumable_life_s: float = 600.0
    """A resumable stream can be resumed for this long after its last event."""
    resumable_orphan_s: float = 60.0
    """A resumable stream that nobody reads is generated on for this long; resumed later, it goes
    on from there."""
    max_resumable_streams: int = 1000
    """Resumable streams that this proxy writes, and as many that it reads; above it: 429."""
