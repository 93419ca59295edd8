"""The agent's loop: look at orders, records and engines; decide; do. Again and again.

Every look starts from what is so, not from what was done: after a crash of the agent, a lost
reply or a Redis that came back empty, the next look sees the difference and acts on that.
"""

import asyncio
from typing import Final

import msgspec
import structlog

from services.agent.engine import Engine
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
from services.agent.reporting import Reporter
from services.agent.settings import AgentSettings
from services.agent.starting import Starter
from services.agent.statefile import EngineFolders, is_folder_name
from services.agent.telemetry import Telemetry
from shared.clock import Clock
from shared.errors import CorruptRecordError, RegistryError
from shared.ids import is_name
from shared.lifecycle import Loops
from shared.models.host import Host, Member
from shared.models.order import Order, OrderAction
from shared.models.replica import Replica
from shared.registry import Registry

_log = structlog.get_logger(__name__)

RECORDED: Final = frozenset({Phase.STARTING, Phase.READY, Phase.UNHEALTHY})
"""Phases of an engine that has a record, or gets it again after a loss."""
HOST_EVERY_S: Final = 10.0
"""How often the host is registered anew: Redis may have come back empty in between."""


class Keeper:
    """Keeps the engines of one host as ordered. `look` is one turn."""

    def __init__(
        self,
        *,
        settings: AgentSettings,
        clock: Clock,
        starter: Starter,
        folders: EngineFolders,
        telemetry: Telemetry,
        loops: Loops,
        wake: asyncio.Event,
    ) -> None:
        self.wake = wake
        """Set it to have the next look at once."""
        self.empty = asyncio.Event()
        """Set once the agent leaves and the last engine is gone."""
        self.engines: dict[str, Engine] = {}
        self._settings = settings
        self._clock = clock
        self._starter = starter
        self._folders = folders
        self._telemetry = telemetry
        self._loops = loops
        self._registry: Registry | None = None
        self._reporter: Reporter | None = None
        self._online = False
        self._trouble: RegistryError | None = None
        self._exiting = False
        self._orders: dict[str, Order] = {}
        self._records: dict[str, Replica] = {}
        self._odd: set[str] = set()
        self._host_due_s = 0.0

    @property
    def online(self) -> bool:
        """Redis answered the last call."""
        return self._online

    def views(self) -> dict[str, EngineView]:
        """Say how every engine stands now."""
        return {rid: engine.view() for rid, engine in self.engines.items()}

    def connect(self, registry: Registry) -> None:
        """Use `registry` from now on; until then the agent works as if Redis were away."""
        self._registry = registry
        self._reporter = Reporter(registry, self._settings.host_name)

    def adopt_all(self) -> int:
        """Take over the engines that an earlier agent process left; returns how many run."""
        files, corrupt = self._folders.read_all()
        for path in corrupt:
            _log.error(
                "state_file_unreadable", path=str(path), remedy="look for its engine by hand"
            )
        for file in files:
            self._keep(self._starter.adopt(file))
        return sum(engine.beats for engine in self.engines.values())

    async def look(self) -> None:
        """Look, decide and do once."""
        try:
            world = await self._observe()
            self._set_online(None)
        except RegistryError as error:
            self._set_online(error)
            world = self._world(online=False)
        try:
            for action in reconcile(world):
                await self._do(action)
        except RegistryError as error:
            self._set_online(error)
        if self._exiting and not self._online:
            self._part()
        if self._exiting and not self.engines:
            self.empty.set()
        self._telemetry.count_engines([engine.phase for engine in self.engines.values()])

    async def beat(self, member: Member, host: Host) -> None:
        """Beat for this agent and for each of its engines."""
        if self._reporter is None:
            return
        due = self._clock.monotonic_s() >= self._host_due_s
        try:
            await self._reporter.beat(list(self.engines.values()))
            await self._reporter.present(member, host if due else None)
        except RegistryError as error:
            self._set_online(error)
            return
        if due:
            self._host_due_s = self._clock.monotonic_s() + HOST_EVERY_S

    def leave(self) -> None:
        """Drain and stop every engine, and start none; `look` goes on until they are gone."""
        self._exiting = True
        self.wake.set()

    async def _observe(self) -> World:
        if self._registry is None:
            return self._world(online=False)
        registry = self._registry
        # Orders before records: a record is written before its order, so each order's is seen.
        host = self._settings.host_name
        if isinstance(self._trouble, CorruptRecordError):
            await registry.fleet.set_aside(registry.keys.fleet.orders(host), "hash")
        self._orders = self._sound(await registry.fleet.orders(host))
        models = {order.model for order in self._orders.values()}
        models |= {engine.order.model for engine in self.engines.values()}
        records: dict[str, Replica] = {}
        for model in models:
            records |= (await registry.replicas.snapshot(model)).replicas
        self._records = records
        for model in {e.order.model for e in self.engines.values() if e.draining}:
            totals = await registry.ledger.totals(model)
            for engine in self.engines.values():
                if engine.order.model == model:
                    held = totals.get(engine.order.rid)
                    engine.reserved = held.requests if held else 0
        declared = Declared()
        if any(rid not in records and rid not in self._orders for rid in self.engines):
            deployments = await registry.fleet.deployments()
            declared = Declared(
                live=frozenset(name for name, d in deployments.items() if not d.deleted),
                anything=bool(deployments) or bool(deployments.corrupt),
            )
        return self._world(online=True, declared=declared)

    def _world(self, *, online: bool, declared: Declared | None = None) -> World:
        orders = dict(self._orders)
        if not online:
            # An agent that was restarted while Redis is away knows the orders its engines had.
            orders = {rid: e.order for rid, e in self.engines.items()} | orders
        if self._exiting:
            orders = {rid: self._farewell(engine) for rid, engine in self.engines.items()}
        return World(
            host=self._settings.host_name,
            now_s=self._clock.monotonic_s(),
            online=online,
            orders=orders,
            engines=self.views(),
            records=self._records,
            declared=declared or Declared(),
            accepting=not self._exiting,
            orphan_grace_s=self._settings.orphan_grace_s,
        )

    def _part(self) -> None:
        """Stop every engine of an agent that exits, without Redis to say whether it is idle."""
        for rid, engine in list(self.engines.items()):
            if engine.phase not in {Phase.STOPPING, Phase.ENDED}:
                engine.stop("its agent exits")
            elif engine.view().clean:
                self._forget(rid)

    def _farewell(self, engine: Engine) -> Order:
        return msgspec.structs.replace(
            engine.order,
            action=OrderAction.DRAIN,
            drain_timeout_s=self._settings.exit_drain_s,
        )

    def _sound(self, orders: dict[str, Order]) -> dict[str, Order]:
        """Leave out orders that no controller writes: foreign data in Redis hurts nobody."""
        sound: dict[str, Order] = {}
        for rid, order in orders.items():
            if order.rid == rid and is_folder_name(rid) and is_name(order.model):
                sound[rid] = order
            elif rid not in self._odd:
                self._odd.add(rid)
                _log.error("order_refused", field=rid, reason="its names are not valid")
        return sound

    async def _do(self, action: Action) -> None:
        match action:
            case Start():
                self._start(action)
            case Stop():
                self.engines[action.rid].stop(action.why)
            case Drain():
                self.engines[action.rid].drain(action.timeout_s, action.why)
            case Orphan():
                now_s = self._clock.monotonic_s() if action.orphan else None
                self.engines[action.rid].orphan_since_s = now_s
            case Forget():
                self._forget(action.rid)
            case Report() | Amend() | Register():
                await self._report(action)

    async def _report(self, action: Report | Amend | Register) -> None:
        if self._reporter is None:
            return
        engine = self.engines.get(action.rid)
        if isinstance(action, Report):
            if await self._reporter.step(action, engine):
                self.wake.set()
        elif engine is not None and isinstance(action, Amend):
            await self._reporter.amend(engine)
        elif engine is not None and engine.phase in RECORDED:
            self._host_due_s = 0.0  # where records were lost, the host's may be lost too
            await self._reporter.register(engine)

    def _start(self, action: Start) -> None:
        rid = action.order.rid
        taken = {engine.port for other, engine in self.engines.items() if other != rid}
        self._keep(
            self._starter.start(
                action.order, phase=action.phase, taken=taken, before=self.engines.get(rid)
            )
        )

        self.wake.set()

    def _keep(self, engine: Engine) -> None:
        self.engines[engine.order.rid] = engine
        self._loops.start(f"engine {engine.order.rid}", engine.run())

    def _forget(self, rid: str) -> None:
        del self.engines[rid]
        self._folders.forget(rid)

    def _set_online(self, error: RegistryError | None) -> None:
        self._trouble = error
        online = error is None and self._registry is not None
        if online != self._online:
            if online:
                _log.info("redis_answers")
                self._host_due_s = 0.0
            else:
                _log.warning("redis_away", error=str(error), effect="engines go on, orders wait")
        self._online = online
        self._telemetry.redis_up.set(int(online))
