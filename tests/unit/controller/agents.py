"""A minimal agent over the real registry: obeys orders with replicas that need no process."""

import asyncio
import contextlib

from shared.errors import RegistryError
from shared.models.host import Host, Member, MemberKind
from shared.models.order import Order, OrderAction
from shared.models.replica import Replica, ReplicaState
from shared.registry import Registry
from shared.registry.replicas import ReplicaBeat


class ObedientAgent:
    """Beats, and takes each of its replicas one step on whenever it looks at its orders."""

    def __init__(self, registry: Registry, host: Host) -> None:
        self._registry = registry
        self._host = host

    async def work(self) -> None:
        """Obey for ever; a lost connection is tried again."""
        while True:
            with contextlib.suppress(RegistryError):
                await self._look()
            await asyncio.sleep(0.05)

    async def _look(self) -> None:
        fleet = self._registry.fleet
        await fleet.put_host(self._host)
        await fleet.beat(
            Member(
                kind=MemberKind.AGENT,
                id=self._host.host,
                host=self._host.host,
                pid=1,
                version="0",
                started_ms=0,
            )
        )
        for order in (await fleet.orders(self._host.host)).values():
            snapshot = await self._registry.replicas.snapshot(order.model)
            record = snapshot.replicas.get(order.rid)
            if record is not None:
                await self._registry.replicas.heartbeat(
                    order.model, [ReplicaBeat(rid=order.rid, gen=order.gen)]
                )
                await self._obey(order, record)

    async def _obey(self, order: Order, record: Replica) -> None:
        steps = {
            (OrderAction.RUN, ReplicaState.PENDING): ReplicaState.STARTING,
            (OrderAction.RUN, ReplicaState.STARTING): ReplicaState.READY,
            (OrderAction.DRAIN, ReplicaState.DRAINING): ReplicaState.STOPPED,
        }
        to = steps.get((order.action, record.state))
        if to is not None:
            await self._registry.replicas.transition(
                record.rid,
                record.model,
                gen=record.gen,
                expect=record.state,
                to=to,
                patch={"url": f"http://10.0.0.1/{record.rid}"},
                fence=None,
            )
