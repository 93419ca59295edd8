"""Hosts whose agents decide with the real agent's rules, over the real registry, at virtual time.

Only the engines are make-believe: one that was started is READY a second later, and one that was
told to stop has ended a second later. So what these hosts run is what real agents would run.
"""

import msgspec

from services.agent.reconcile import (
    Action,
    Amend,
    Declared,
    Drain,
    EngineView,
    Forget,
    Orphan,
    Phase,
    Register,
    Report,
    Start,
    Stop,
    World,
    reconcile,
)
from shared.models.host import Host, Member, MemberKind
from shared.models.order import Order
from shared.models.replica import Replica, ReplicaState
from shared.registry import Registry
from shared.registry.replicas import ReplicaBeat
from shared.registry.results import Refused

_NEXT = {Phase.STARTING: Phase.READY, Phase.STOPPING: Phase.ENDED}
_STATE = {Phase.READY: ReplicaState.READY, Phase.UNHEALTHY: ReplicaState.UNHEALTHY}


class SimHost:
    """One host, its agent and its engines."""

    def __init__(self, registry: Registry, host: Host) -> None:
        self.host = host
        self.alive = True
        self.engines: dict[str, EngineView] = {}
        self.launched: dict[str, Order] = {}
        """Replica id → the order that its engine was started by."""
        self._registry = registry
        self._registered = False

    def running(self) -> list[Order]:
        """Give the orders of the engines whose processes run."""
        return [
            self.launched[rid]
            for rid, engine in self.engines.items()
            if engine.phase is not Phase.ENDED
        ]

    def crash(self, rid: str) -> None:
        """Let an engine die."""
        self._change(rid, phase=Phase.ENDED, clean=True, reason="killed by SIGKILL")

    def lose(self) -> None:
        """Let the whole host vanish with all that runs on it."""
        self.alive = False
        self.engines.clear()

    async def look(self, now_s: float) -> int:
        """Beat, see engines move on, look at the orders and obey; tells how much was done."""
        if not self.alive:
            return 0
        done = 0
        for rid, engine in list(self.engines.items()):
            if engine.phase in _NEXT:
                done += 1
                self._change(rid, phase=_NEXT[engine.phase])
                if engine.phase is Phase.STOPPING:
                    self._change(rid, wanted_end=True, clean=True)
        await self._beat()
        for action in reconcile(await self._world(now_s)):
            done += 1
            await self._do(action, now_s)
        return done

    async def _beat(self) -> None:
        name = self.host.host
        fleet = self._registry.fleet
        if not self._registered:
            await fleet.put_host(self.host)
            self._registered = True
        await fleet.beat(
            Member(kind=MemberKind.AGENT, id=name, host=name, pid=1, version="0", started_ms=0)
        )
        beats: dict[str, list[ReplicaBeat]] = {}
        for order in self.running():
            beats.setdefault(order.model, []).append(ReplicaBeat(rid=order.rid, gen=order.gen))
        for model, lines in beats.items():
            await self._registry.replicas.heartbeat(model, lines)

    async def _world(self, now_s: float) -> World:
        registry = self._registry
        orders = await registry.fleet.orders(self.host.host)
        models = {order.model for order in orders.values()}
        models |= {engine.model for engine in self.engines.values()}
        records: dict[str, Replica] = {}
        for model in sorted(models):
            records |= (await registry.replicas.snapshot(model)).replicas
        unknown = any(rid not in records and rid not in orders for rid in self.engines)
        declared = dict(await registry.fleet.deployments()) if unknown else {}
        return World(
            host=self.host.host,
            now_s=now_s,
            online=True,
            orders=orders,
            engines=self.engines,
            records=records,
            declared=Declared(
                live=frozenset(name for name, d in declared.items() if not d.deleted),
                anything=bool(declared),
            ),
        )

    async def _do(self, action: Action, now_s: float) -> None:
        match action:
            case Start(order=order, phase=phase):
                self.launched[order.rid] = order
                self.engines[order.rid] = EngineView(
                    rid=order.rid,
                    model=order.model,
                    gen=order.gen,
                    kind=order.spec.engine.kind,
                    phase=phase,
                    url=order.url or f"http://{self.host.address}/{order.rid}",
                )
            case Drain(rid=rid, timeout_s=timeout_s):
                self._change(rid, draining_since_s=now_s, drain_timeout_s=timeout_s, idle=True)
            case Stop(rid=rid):
                self._change(rid, phase=Phase.STOPPING)
            case Orphan(rid=rid, orphan=orphan):
                self._change(rid, orphan_since_s=now_s if orphan else None)
            case Forget(rid=rid):
                del self.engines[rid]
            case Report() | Amend() | Register():
                await self._tell(action)

    async def _tell(self, action: Report | Amend | Register) -> None:
        engine, replicas = self.engines.get(action.rid), self._registry.replicas
        place: dict[str, object] = {"url": engine.url} if engine is not None else {}
        if isinstance(action, Report):
            refused = await replicas.transition(
                action.rid,
                action.model,
                gen=action.gen,
                expect=action.expect,
                to=action.to,
                patch={"reason": action.reason, **place},
                fence=None,
            )
            assert not isinstance(refused, Refused), (action, refused)
        elif engine is not None and isinstance(action, Amend):
            await replicas.patch(engine.rid, engine.model, gen=engine.gen, patch=place, fence=None)
        elif engine is not None:
            order = self.launched[engine.rid]
            record = Replica(
                rid=engine.rid,
                model=engine.model,
                gen=engine.gen,
                state=_STATE[engine.phase],
                host=self.host.host,
                revision=order.revision,
                kind=engine.kind,
                url=engine.url,
                max_requests=order.spec.routing.max_requests_per_replica,
            )
            await replicas.register(record)

    def _change(self, rid: str, **fields: object) -> None:
        self.engines[rid] = msgspec.structs.replace(self.engines[rid], **fields)
