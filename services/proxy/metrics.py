"""Metrics of the proxy, with label values bound once per model so that a request looks none up.

Labels come from closed sets: models that the routing table knows, classes of status, reasons from
our own enums. Nothing a client sends becomes a label.
"""

from typing import Final

from prometheus_client import CollectorRegistry, Gauge

from services.proxy.tally import Spreads, Tallies

STATUS_CLASSES: Final = ("2xx", "4xx", "5xx", "cut", "gone")
"""Outcomes of a request: by status; `cut`: broken after its first byte; `gone`: client left."""
FAILOVERS: Final = ("exact", "valid", "refused", "failed")
"""What became of a stream that lost its replica; the first two each time it went on."""
_LATENCY_S: Final = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)
_BATCH_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5)
_CHOICE_S: Final = (0.0001, 0.00025, *_BATCH_S)
"""A choice without the ledger takes some ten microseconds."""
_BATCH_OPS: Final = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """All metrics of one proxy process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Tallies(
            "redmesh_proxy_requests",
            "Requests by model and outcome.",
            ("model", "outcome"),
            registry=r,
        )
        self.in_flight = Gauge(
            "redmesh_proxy_in_flight", "Requests being answered now.", ("model",), registry=r
        )
        self.held = Gauge(
            "redmesh_proxy_held", "Requests waiting for a replica now.", ("model",), registry=r
        )
        self.first_byte = Spreads(
            "redmesh_proxy_first_byte_seconds",
            "From request to first byte of its answer.",
            ("model",),
            bounds=_LATENCY_S,
            registry=r,
        )
        self.duration = Spreads(
            "redmesh_proxy_duration_seconds",
            "From request to the end of its answer.",
            ("model",),
            bounds=_LATENCY_S,
            registry=r,
        )
        self.events = Tallies(
            "redmesh_proxy_stream_events",
            "Server-sent events relayed; about one for each token.",
            ("model",),
            registry=r,
        )
        self.retries = Tallies(
            "redmesh_proxy_retries",
            "Tries that failed before the first byte, by reason.",
            ("model", "reason"),
            registry=r,
        )
        self.failovers = Tallies(
            "redmesh_proxy_stream_failovers",
            "Streams that lost their replica, by what became of them: gone on exactly, gone on "
            "with another sample, refused by the rules, or failed for want of a replica.",
            ("model", "outcome"),
            registry=r,
        )
        self.resumes = Tallies(
            "redmesh_proxy_stream_resumes",
            "Resumable streams that a client came back to (followed), and those that this proxy "
            "took over from another (taken_over).",
            ("outcome",),
            registry=r,
        )
        self.resumable = Gauge(
            "redmesh_proxy_resumable_streams",
            "Resumable streams that this proxy generates now.",
            registry=r,
        )
        self.carried = Gauge(
            "redmesh_proxy_carried_streams",
            "Streams whose tokens are carried in compiled code now.",
            registry=r,
        )
        self.ejections = Tallies(
            "redmesh_proxy_ejections", "Replicas ejected locally.", ("model",), registry=r
        )
        self.table_version = Gauge(
            "redmesh_proxy_table_version", "Version of the routing table.", ("model",), registry=r
        )
        self.ready_replicas = Gauge(
            "redmesh_proxy_ready_replicas", "READY replicas in the table.", ("model",), registry=r
        )
        self.batch_ops = Spreads(
            "redmesh_proxy_ledger_batch_operations",
            "Operations in one ledger call.",
            ("model",),
            bounds=_BATCH_OPS,
            registry=r,
        )
        self.batch_s = Spreads(
            "redmesh_proxy_ledger_batch_seconds",
            "Duration of one ledger call.",
            ("model",),
            bounds=_BATCH_S,
            registry=r,
        )
        self.choice_s = Spreads(
            "redmesh_proxy_choice_seconds",
            "From asking for a replica to having one, by the ledger or without it.",
            ("model",),
            bounds=_CHOICE_S,
            registry=r,
        )
        self.ledger_misses = Tallies(
            "redmesh_proxy_ledger_misses", "Deadlines the ledger missed.", ("model",), registry=r
        )
        self.ledger_errors = Tallies(
            "redmesh_proxy_ledger_errors", "Ledger calls that failed.", ("model",), registry=r
        )
        self.local_choices = Tallies(
            "redmesh_proxy_local_choices",
            "Replicas chosen without the ledger.",
            ("model",),
            registry=r,
        )
        self.breaker_open = Gauge(
            "redmesh_proxy_ledger_away", "1 while the ledger is not asked.", ("model",), registry=r
        )
        self.away_s = Gauge(
            "redmesh_proxy_ledger_away_seconds",
            "For how long the ledger has been away.",
            ("model",),
            registry=r,
        )
        self.drift = Gauge(
            "redmesh_proxy_ledger_drift",
            "Ledger's count minus live requests, at the last beat.",
            ("model",),
            registry=r,
        )
        self.repairs = Tallies(
            "redmesh_proxy_ledger_repairs",
            "Leases adopted or released by comparing.",
            ("model",),
            registry=r,
        )
        self.recounted = Tallies(
            "redmesh_proxy_ledger_recounted",
            "Totals and scores of a model that did not follow from its leases, and were corrected.",
            ("model",),
            registry=r,
        )
        self.refused = Tallies(
            "redmesh_proxy_refused",
            "Requests answered by the proxy itself before a model was known.",
            ("status",),
            registry=r,
        )


class LedgerMetrics:
    """The ledger's metrics of one model."""

    __slots__ = (
        "batch_ops",
        "batch_s",
        "breaker_open",
        "choice_s",
        "drift",
        "errors",
        "local_choices",
        "misses",
        "repairs",
    )

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.batch_ops = metrics.batch_ops.labels(model)
        self.batch_s = metrics.batch_s.labels(model)
        self.breaker_open = metrics.breaker_open.labels(model)
        self.choice_s = metrics.choice_s.labels(model)
        self.drift = metrics.drift.labels(model)
        self.errors = metrics.ledger_errors.labels(model)
        self.local_choices = metrics.local_choices.labels(model)
        self.misses = metrics.ledger_misses.labels(model)
        self.repairs = metrics.repairs.labels(model)


class ModelMetrics:
    """The request metrics of one model."""

    __slots__ = (
        "duration",
        "ejections",
        "events",
        "failovers",
        "first_byte",
        "outcomes",
        "retries",
    )

    def __init__(self, metrics: Metrics, model: str, reasons: tuple[str, ...]) -> None:
        self.first_byte = metrics.first_byte.labels(model)
        self.duration = metrics.duration.labels(model)
        self.events = metrics.events.labels(model)
        self.ejections = metrics.ejections.labels(model)
        self.failovers = {kind: metrics.failovers.labels(model, kind) for kind in FAILOVERS}
        self.outcomes = {kind: metrics.requests.labels(model, kind) for kind in STATUS_CLASSES}
        self.retries = {reason: metrics.retries.labels(model, reason) for reason in reasons}
