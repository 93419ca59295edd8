"""A plan in the making: the actions so far, and the world as it will be once they are done.

Later rules of a plan must see what earlier ones decided (a replica that is being drained no longer
counts, a GPU just given away is taken). The draft keeps that, for one plan, in one place.
"""

from typing import Final

import msgspec

from services.controller.actions import Action, CreateReplica, Move, RemoveReplica, Report
from services.controller.placement import Occupant, Site, choose_gpus
from services.controller.world import LIVING, SILENT_MS, World, ended
from shared.models.deployment import DeploymentSpec, EngineKind
from shared.models.event import Event, EventLevel
from shared.models.order import Order, OrderAction
from shared.models.replica import Replica, ReplicaState

SWEEP_PREFIX: Final = "health: "
"""Reasons of the leader's own health decisions begin so; its budget counts them."""
DRAIN_TIMEOUT_S: Final = 180.0
"""What requests in flight get to finish when their replica is retired."""
UNHEALTHY_DRAIN_TIMEOUT_S: Final = 10.0
"""The same for a replica that has not answered for a minute anyway."""


class Draft:
    """Collects one plan. Lives as long as the call that makes the plan."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.actions: list[Action] = []
        self._replicas = {model: dict(view.replicas) for model, view in world.models.items()}
        self.occupants = _occupants(world)
        self.sites = [
            Site(host=host, closed=_closed(world, name)) for name, host in world.hosts.items()
        ]

    def replicas(self, model: str) -> list[Replica]:
        """Give the records of `model` as they will be, in a stable order."""
        return sorted(self._replicas[model].values(), key=lambda replica: replica.rid)

    def living(self, model: str) -> list[Replica]:
        """Give the records of `model` that count towards the wanted number."""
        return [replica for replica in self.replicas(model) if replica.state in LIVING]

    def add(self, action: Action) -> None:
        """Add an action that changes no record."""
        self.actions.append(action)

    def move(
        self, replica: Replica, to: ReplicaState, reason: str, event: Event | None = None
    ) -> None:
        """Move `replica` on, and give its host the order that follows."""
        moved = msgspec.structs.replace(
            replica, state=to, reason=reason, since_ms=self.world.now_ms
        )
        self._replicas[replica.model][replica.rid] = moved
        self.actions.append(
            Move(
                replica=replica,
                to=to,
                order=order_for(self.world, moved),
                reason=reason,
                event=event,
            )
        )

    def create(self, spec: DeploymentSpec, occupant: Occupant, url: str, reason: str) -> None:
        """Create a replica of `spec` where `occupant` says, and take the room it needs."""
        self.occupants.append(occupant)
        replica = Replica(
            rid="",
            model=spec.name,
            gen=0,
            state=ReplicaState.PENDING,
            host=occupant.host,
            revision=spec.revision(),
            kind=spec.engine.kind,
            url=url,
            api_key_env=spec.engine.api_key_env,
            max_requests=spec.routing.max_requests_per_replica,
            reason=reason,
        )
        order = Order(
            rid="",
            model=spec.name,
            gen=0,
            action=OrderAction.RUN,
            revision=replica.revision,
            spec=spec,
            url=url,
            gpu_indices=occupant.gpu_indices,
            drain_timeout_s=DRAIN_TIMEOUT_S,
        )
        where = f"on {occupant.host}" + (
            f", GPU {', '.join(map(str, occupant.gpu_indices))}" if occupant.gpu_indices else ""
        )
        self.actions.append(
            CreateReplica(
                replica=replica,
                order=order,
                reason=reason,
                event=tell("ReplicaCreated", f"deployment/{spec.name}", f"{reason}: {where}"),
            )
        )

    def report(self, kind: str, subject: str, message: str, level: EventLevel) -> None:
        """Tell operators something that changes nothing."""
        event = tell(kind, subject, message, level)
        self.actions.append(Report(reason=message, event=event))

    def remove(self, replica: Replica, reason: str) -> None:
        """Forget an ended replica."""
        del self._replicas[replica.model][replica.rid]
        self.actions.append(RemoveReplica(replica=replica, reason=reason))


def tell(kind: str, subject: str, message: str, level: EventLevel = EventLevel.INFO) -> Event:
    """Make an event; who says so and when is filled in when it is emitted."""
    return Event(kind=kind, subject=subject, message=message, level=level)


def order_for(world: World, replica: Replica) -> Order | None:
    """Derive the order that a record's state calls for; None if it calls for none.

    An ended replica's order says STOP as long as there is one: a leader may have given up a
    replica whose engine still runs.
    """
    given = world.orders.get(replica.host, {}).get(replica.rid)
    if replica.state is ReplicaState.STOPPED or (ended(replica) and given is None):
        return None
    if ended(replica):
        action = OrderAction.STOP
    elif replica.state is ReplicaState.DRAINING:
        action = OrderAction.DRAIN
    else:
        action = OrderAction.RUN
    spec = world.spec_of(replica)
    swept = replica.reason.startswith(SWEEP_PREFIX)
    return Order(
        rid=replica.rid,
        model=replica.model,
        gen=replica.gen,
        action=action,
        revision=replica.revision,
        spec=spec,
        url=replica.url if replica.kind is EngineKind.EXTERNAL else "",
        gpu_indices=given.gpu_indices if given is not None else _gpus_again(world, replica, spec),
        drain_timeout_s=UNHEALTHY_DRAIN_TIMEOUT_S if swept else DRAIN_TIMEOUT_S,
        issued_ms=world.now_ms,
    )


def _gpus_again(world: World, replica: Replica, spec: DeploymentSpec) -> tuple[int, ...]:
    """Choose GPUs for an order that was lost; a running engine keeps those it already has."""
    host = world.hosts.get(replica.host)
    if host is None or not host.gpus or spec.resources.gpus == 0:
        return ()
    here = [o for o in _occupants(world) if o.host == replica.host]
    chosen = choose_gpus(spec.resources, spec.resources.gpus, host, here)
    return () if isinstance(chosen, str) else chosen


def _closed(world: World, name: str) -> str:
    hold = world.holds.get(f"host:{name}")
    if hold is not None:
        return "draining" if hold.drain else "cordoned"
    silent_ms = world.agents_silent_ms.get(name)
    if silent_ms is None:
        return "its agent has not been heard"
    if silent_ms > SILENT_MS:
        # No number here: the same reason each second is one event, not many.
        return "its agent is silent"
    return ""


def _occupants(world: World) -> list[Occupant]:
    found: list[Occupant] = []
    recorded: set[tuple[str, str]] = set()
    for view in world.models.values():
        for replica in view.replicas.values():
            recorded.add((replica.host, replica.rid))
            if ended(replica):
                continue
            order = world.orders.get(replica.host, {}).get(replica.rid)
            found.append(
                Occupant(
                    host=replica.host,
                    model=replica.model,
                    kind=replica.kind,
                    resources=world.spec_of(replica).resources,
                    gpu_indices=order.gpu_indices if order is not None else (),
                )
            )
    # Orders without a record: perhaps an engine that is about to register again, so its room is
    # not free.
    found.extend(
        Occupant(
            host=host,
            model=order.model,
            kind=order.spec.engine.kind,
            resources=order.spec.resources,
            gpu_indices=order.gpu_indices,
        )
        for host, orders in world.orders.items()
        for order in orders.values()
        if (host, order.rid) not in recorded and order.action is not OrderAction.STOP
    )
    return found
