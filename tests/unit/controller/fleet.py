"""A simulated fleet for the planner: records, orders, hosts and agents that obey, in plain Python.

It holds each action to the rules that the registry's scripts enforce, and the invariants that the
plan promises.
"""

from collections.abc import Iterable

import msgspec

from services.controller.actions import (
    Action,
    CreateReplica,
    DropHold,
    DropOrder,
    ForgetHost,
    ForgetMember,
    ForgetModel,
    Move,
    PatchReplica,
    PutOrder,
    RemoveReplica,
    Report,
    WriteSpec,
)
from services.controller.world import LIVING, ModelView, World
from shared.models.deployment import (
    Deployment,
    DeploymentSpec,
    EngineKind,
    EngineSpec,
    ReplicaBounds,
)
from shared.models.host import Gpu, Hold, Host
from shared.models.order import Order, OrderAction
from shared.models.replica import ENDED, TRANSITIONS, Replica, ReplicaState
from shared.models.routing import ModelSpec

GIB = 1 << 30


def host(name: str, *, gpus: int = 0, max_replicas: int = 64, cpus: float = 8.0) -> Host:
    """Make a host that runs every kind of engine."""
    return Host(
        host=name,
        address="10.0.0.1",
        cpus=cpus,
        memory_bytes=64 * GIB,
        gpus=tuple(
            Gpu(index=i, uuid=f"{name}-{i}", name="GPU", memory_bytes=80 * GIB) for i in range(gpus)
        ),
        engines=("vllm", "sim", "external"),
        max_replicas=max_replicas,
    )


def declared(
    name: str = "m",
    replicas: int = 1,
    *,
    kind: EngineKind = EngineKind.SIM,
    dtype: str = "auto",
    urls: tuple[str, ...] = (),
) -> Deployment:
    """Declare a deployment; another `dtype` is another revision."""
    spec = DeploymentSpec(
        name=name,
        engine=EngineSpec(kind=kind, model="w", dtype=dtype, urls=urls),
        replicas=ReplicaBounds(count=replicas),
    )
    return Deployment(spec=spec, generation=1, replicas=replicas)


class Fleet:
    """The stored state of a fleet, and agents that act on it."""

    def __init__(self, hosts: Iterable[Host], deployments: Iterable[Deployment]) -> None:
        self.now_ms = 1_700_000_000_000
        self.hosts = {h.host: h for h in hosts}
        self.dead: set[str] = set()
        self.died_ms: dict[str, int] = {}
        self.deployments = {d.spec.name: d for d in deployments}
        self.specs: dict[str, ModelSpec] = {}
        self.replicas: dict[str, dict[str, Replica]] = {}
        self.orders: dict[str, dict[str, Order]] = {}
        self.holds: dict[str, Hold] = {}
        self.broken: set[str] = set()
        """Revisions whose engines fail to start."""
        self.settled = True
        self.beats: dict[str, int] = {}
        self.answers: dict[str, bool] = {}
        self.load: dict[str, int] = {}
        self.forgotten_members: list[str] = []
        self.members: dict[str, int] = {}
        self._minted = 0

    def world(self) -> World:
        """Read everything, as the leader does."""
        return World(
            now_ms=self.now_ms,
            settled=self.settled,
            models={
                name: ModelView(
                    deployment=deployment,
                    spec=self.specs.get(name, ModelSpec(model=name)),
                    replicas=dict(self.replicas.get(name, {})),
                    beats_ms=dict(self.beats),
                    load_tokens=dict(self.load),
                )
                for name, deployment in self.deployments.items()
            },
            hosts=dict(self.hosts),
            agents_silent_ms={
                name: self.now_ms - self.died_ms[name] if name in self.dead else 0
                for name in self.hosts
            },
            orders={name: dict(orders) for name, orders in self.orders.items()},
            holds=dict(self.holds),
            answers=dict(self.answers),
            members_silent_ms=dict(self.members),
        )

    def all_replicas(self) -> list[Replica]:
        """Give every record."""
        return [r for records in self.replicas.values() for r in records.values()]

    def living(self, model: str = "m") -> list[Replica]:
        """Give the records of `model` that count towards the wanted number."""
        return [r for r in self.replicas.get(model, {}).values() if r.state in LIVING]

    def ready(self, model: str = "m") -> list[Replica]:
        """Give the READY records of `model`."""
        return [r for r in self.living(model) if r.state is ReplicaState.READY]

    def declare(self, deployment: Deployment) -> None:
        """Declare a change, as `redmesh apply` and `scale` do."""
        old = self.deployments.get(deployment.spec.name)
        generation = old.generation + 1 if old else 1
        self.deployments[deployment.spec.name] = msgspec.structs.replace(
            deployment, generation=generation
        )

    def kill_agent(self, name: str) -> None:
        """Let the agent of a host fall silent."""
        self.dead.add(name)
        self.died_ms[name] = self.now_ms

    def apply(self, actions: Iterable[Action]) -> None:
        """Carry out actions as the registry would; an illegal one fails the test."""
        for action in actions:
            self._apply(action)

    def _apply(self, action: Action) -> None:
        match action:
            case WriteSpec(spec=spec):
                self.specs[spec.model] = msgspec.structs.replace(spec, epoch=1)
            case CreateReplica(replica=replica, order=order):
                self._minted += 1
                rid = f"{replica.model}-{self._minted}"
                new = msgspec.structs.replace(
                    replica, rid=rid, gen=self.now_ms, since_ms=self.now_ms
                )
                self.replicas.setdefault(replica.model, {})[rid] = new
                order = msgspec.structs.replace(order, rid=rid, gen=self.now_ms)
                self.put(replica.host, order)
            case Move(replica=seen, to=to, order=order):
                now = self.replicas[seen.model][seen.rid]
                assert now.state is seen.state
                self.move(now, to, action.reason)
                if order is not None:
                    self.put(seen.host, order)
            case PatchReplica(replica=seen, max_requests=limit):
                now = self.replicas[seen.model][seen.rid]
                self.replicas[seen.model][seen.rid] = msgspec.structs.replace(
                    now, max_requests=limit
                )
            case PutOrder(host=name, order=order):
                self.put(name, order)
            case _:
                self._forget(action)

    def _forget(self, action: Action) -> None:
        match action:
            case DropOrder(host=name, rid=rid):
                self.orders.get(name, {}).pop(rid, None)
            case RemoveReplica(replica=seen):
                self.orders.get(seen.host, {}).pop(seen.rid, None)
                assert self.replicas[seen.model].pop(seen.rid).state in ENDED
            case ForgetModel(model=model):
                assert not self.replicas.get(model)
                del self.deployments[model]
                self.specs.pop(model, None)
            case ForgetHost(host=name):
                del self.hosts[name]
            case ForgetMember(field=field):
                self.forgotten_members.append(field)
                self.members.pop(field, None)
            case DropHold(subject=subject):
                del self.holds[subject]
            case Report():
                pass
            case _:
                raise AssertionError(f"unknown action {action}")

    def move(self, replica: Replica, to: ReplicaState, reason: str = "") -> None:
        """Move a record on; an illegal transition fails the test."""
        assert to in TRANSITIONS[replica.state], (replica, to)
        self.replicas[replica.model][replica.rid] = msgspec.structs.replace(
            replica, state=to, reason=reason, since_ms=self.now_ms
        )

    def put(self, name: str, order: Order) -> None:
        """Put an order; two orders for one replica on two hosts fail the test."""
        elsewhere = [h for h, orders in self.orders.items() if order.rid in orders and h != name]
        assert not elsewhere, f"a second order for {order.rid}"
        self.orders.setdefault(name, {})[order.rid] = order

    def step(self, seconds: float = 1.0) -> None:
        """Let time pass, then let every living agent take each of its replicas one step on."""
        self.now_ms += round(seconds * 1000)
        for replica in self.all_replicas():
            if replica.host in self.dead:
                continue
            self.beats[replica.rid] = self.now_ms
            order = self.orders.get(replica.host, {}).get(replica.rid)
            if order is None:
                continue
            match order.action, replica.state:
                case OrderAction.RUN, ReplicaState.PENDING:
                    self.move(replica, ReplicaState.STARTING)
                case OrderAction.RUN, ReplicaState.STARTING:
                    failed = replica.revision in self.broken
                    self.move(
                        replica,
                        ReplicaState.FAILED if failed else ReplicaState.READY,
                        "exit code 1" if failed else "",
                    )
                case OrderAction.DRAIN, ReplicaState.DRAINING:
                    self.move(replica, ReplicaState.STOPPED)
                case _:
                    pass
