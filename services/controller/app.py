"""One controller: its loops, wired together.

`campaign` keeps or seeks the lease; `tick` (while leading) observes, plans and acts; `reap` drops
what dead proxies held; `beat` says that this process lives; `listen` turns route hints into early
ticks. No loop holds state that another controller would miss: everything is in the registry.
"""

import asyncio
import random
from typing import Final

import structlog

from services.controller.act import Actor
from services.controller.events import EventLog
from services.controller.leader import Leader, Reign
from services.controller.metrics import Metrics
from services.controller.probing import Prober
from services.controller.reaper import reap_dead_proxies
from services.controller.settings import ControllerSettings
from services.controller.term import Term
from shared.clock import Clock
from shared.errors import LeadershipLostError, RegistryError
from shared.lifecycle import Loops, every
from shared.models.host import Member
from shared.registry import Registry
from shared.registry.results import Fence

BEAT_S: Final = 1.0
REAP_S: Final = 1.0
CAMPAIGN_SHARE: Final = 0.2
"""The lease is renewed five times in its life."""
BREATH_S: Final = 0.05
"""Pause before a tick, so that a burst of hints is one reading."""

_log = structlog.get_logger(__name__)


class Controller:
    """A candidate for leadership, and the leader while it leads."""

    def __init__(
        self,
        settings: ControllerSettings,
        registry: Registry,
        prober: Prober,
        clock: Clock,
        owner: str,
    ) -> None:
        self.leader = Leader(registry.leadership, clock, owner, ttl_ms=settings.lease_ttl_ms)
        self.metrics = Metrics()
        self._settings = settings
        self._registry = registry
        self._prober = prober
        self._clock = clock
        self._events = EventLog(registry.fleet, clock, f"controller/{owner}")
        self._wake = asyncio.Event()
        self._term: Term | None = None
        self._trouble_s = clock.monotonic_s()

    def start(self, loops: Loops, member: Member) -> None:
        """Start every loop of this controller; `loops` owns them."""
        campaign_s = CAMPAIGN_SHARE * self._settings.lease_ttl_ms / 1000
        loops.start("campaign", every(lambda: self.leader.pause_s(campaign_s), self.campaign))
        loops.start("tick", every(lambda: self._settings.interval_s, self.tick, wake=self._wake))
        loops.start("reap", every(lambda: REAP_S, self.reap))
        loops.start("beat", every(_beat_interval_s, lambda: self._beat(member)))
        loops.start("listen", self._listen())

    async def leave(self, member: Member) -> None:
        """Give up leadership and leave the fleet, after the loops have ended."""
        await self.leader.resign()
        try:
            await self._registry.fleet.forget_member(member.field)
        except RegistryError as error:
            _log.debug("leave_failed", reason=str(error))

    def not_ready(self) -> str | None:
        """Say why this controller could not take over; a standby that could is ready."""
        return self.leader.problem

    async def campaign(self) -> None:
        """Keep the lease, or try to get it; an election wakes the tick."""
        before = self.leader.reign()
        await self.leader.campaign()
        reign = self.leader.reign()
        if self.leader.problem is not None:
            self._trouble_s = self._clock.monotonic_s()
        if reign != before:
            self._wake.set()

    async def tick(self) -> None:
        """While leading: observe, plan, act. Never raises what the next tick can mend."""
        await asyncio.sleep(BREATH_S)
        reign = self.leader.reign()
        if reign is None:
            self._term = None
            self.metrics.step_down()
            return
        try:
            term = await self._term_of(reign)
            await term.step(settled=self._settled(reign))
        except LeadershipLostError as error:
            self._lost(reign, error)
        except RegistryError as error:
            _log.warning("tick_failed", reason=str(error))
            self.metrics.failures.labels("registry").inc()
            self._trouble_s = self._clock.monotonic_s()

    async def reap(self) -> None:
        """While leading: drop what dead proxies held."""
        term = self._term
        if term is None or term.world is None or not self.leader.may_act(term.reign):
            return
        try:
            dropped = await reap_dead_proxies(
                self._registry.ledger, term.actor, sorted(term.world.models)
            )
        except LeadershipLostError as error:
            self._lost(term.reign, error)
            return
        except RegistryError as error:
            _log.warning("reap_failed", reason=str(error))
            return
        self.metrics.reaped.inc(dropped)

    async def _term_of(self, reign: Reign) -> Term:
        """Give the term of `reign`; one that could not begin is begun again."""
        if self._term is not None and self._term.reign == reign:
            return self._term
        actor = Actor(
            self._registry,
            self._events,
            Fence(reign.epoch, self.leader.owner),
            lambda: self.leader.may_act(reign),
            self.metrics.count_action,
        )
        term = Term(reign, self._registry, self._prober, self._clock, self.metrics, actor)
        await term.begin(self.leader.owner)
        self._term = term
        self.metrics.leader.set(1)
        return term

    def _lost(self, reign: Reign, error: LeadershipLostError) -> None:
        _log.warning("stepping_down", reason=str(error))
        self.metrics.failures.labels("leadership").inc()
        if self.leader.may_act(reign):
            self.leader.fenced_off()

    def _settled(self, reign: Reign) -> bool:
        calm_since_s = max(reign.since_s, self._trouble_s)
        return self._clock.monotonic_s() - calm_since_s >= self._settings.settle_s

    async def _beat(self, member: Member) -> None:
        try:
            await self._registry.fleet.beat(member)
        except RegistryError as error:
            _log.debug("beat_failed", reason=str(error))

    async def _listen(self) -> None:
        async for _hint in self._registry.routes.hints():
            if self.leader.reign() is not None:
                self._wake.set()


def _beat_interval_s() -> float:
    return BEAT_S * random.uniform(0.8, 1.2)  # noqa: S311 - jitter only
