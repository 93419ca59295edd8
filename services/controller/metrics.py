"""What the controller tells Prometheus."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.controller.world import World
from shared.models.replica import ReplicaState

_TICK_BUCKETS_S: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """The controller's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.leader = Gauge(
            "redmesh_controller_leader",
            "1 while this controller leads.",
            registry=self.registry,
        )
        self.actions = Counter(
            "redmesh_controller_actions_total",
            "Actions of plans, by kind and by what became of them.",
            ("kind", "outcome"),
            registry=self.registry,
        )
        self.observe_s = Histogram(
            "redmesh_controller_observe_seconds",
            "Time to read the whole fleet.",
            buckets=_TICK_BUCKETS_S,
            registry=self.registry,
        )
        self.plan_s = Histogram(
            "redmesh_controller_plan_seconds",
            "Time to make a plan.",
            buckets=_TICK_BUCKETS_S,
            registry=self.registry,
        )
        self.failures = Counter(
            "redmesh_controller_tick_failures_total",
            "Looks at the fleet that ended early, by cause.",
            ("cause",),
            registry=self.registry,
        )
        self.replicas = Gauge(
            "redmesh_controller_replicas",
            "Replicas by model and state, as the leader sees them.",
            ("model", "state"),
            registry=self.registry,
        )
        self.wanted = Gauge(
            "redmesh_controller_wanted_replicas",
            "Replicas that deployments want.",
            ("model",),
            registry=self.registry,
        )
        self.reaped = Counter(
            "redmesh_controller_reaped_reservations_total",
            "Reservations of dead proxies that were dropped.",
            registry=self.registry,
        )

    def count_action(self, kind: str, outcome: str) -> None:
        """Count one action."""
        self.actions.labels(kind, outcome).inc()

    def show(self, world: World) -> None:
        """Show a reading. Only a leader shows replicas: two views would be added up."""
        self.replicas.clear()
        self.wanted.clear()
        for model, view in world.models.items():
            self.wanted.labels(model).set(view.spec.desired_replicas)
            for state in ReplicaState:
                count = sum(r.state is state for r in view.replicas.values())
                self.replicas.labels(model, state.value).set(count)

    def step_down(self) -> None:
        """Show that another controller, or nobody, leads."""
        self.leader.set(0)
        self.replicas.clear()
        self.wanted.clear()
