"""The agent's metrics, in a registry of their own: `redmesh_agent_*`."""

from typing import Final

import prometheus_client

from services.agent.reconcile import Phase

_PROBE_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)


class Telemetry:
    """Counters, gauges and histograms of one agent."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._engines = prometheus_client.Gauge(
            "redmesh_agent_engines",
            "Engines of this host by phase.",
            ["phase"],
            registry=self.registry,
        )
        self.probe_seconds = prometheus_client.Histogram(
            "redmesh_agent_probe_seconds",
            "Time an engine took for a probe's one token.",
            buckets=_PROBE_BUCKETS_S,
            registry=self.registry,
        )
        self.probe_misses = prometheus_client.Counter(
            "redmesh_agent_probe_misses",
            "Probes that an engine did not answer well.",
            registry=self.registry,
        )
        self.engine_failures = prometheus_client.Counter(
            "redmesh_agent_engine_failures",
            "Engines that ended against our will or could not be started.",
            registry=self.registry,
        )
        self.engine_starts = prometheus_client.Counter(
            "redmesh_agent_engine_starts",
            "Engines started, restarts while Redis was away included.",
            registry=self.registry,
        )
        self.engine_restarts = prometheus_client.Counter(
            "redmesh_agent_engine_restarts",
            "Crashed engines started again by their last order while Redis was away.",
            registry=self.registry,
        )
        self.engine_adoptions = prometheus_client.Counter(
            "redmesh_agent_engine_adoptions",
            "Engines taken over from an earlier agent process.",
            registry=self.registry,
        )
        self.redis_up = prometheus_client.Gauge(
            "redmesh_agent_redis_up",
            "1 while Redis answers this agent.",
            registry=self.registry,
        )

    def count_engines(self, phases: list[Phase]) -> None:
        """Set the gauge of engines by phase."""
        for phase in Phase:
            self._engines.labels(phase=phase.value).set(phases.count(phase))
