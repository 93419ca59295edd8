"""Beats: this proxy says that it lives, learns whether the ledger is right, and repairs it.

Each model is beaten for once a second. A beat returns how many reservations Redis holds for this
proxy; when that differs from the live requests by more than what is under way, when Redis had
forgotten this proxy, when a beat or operations were lost, when Redis shows an older version than it
did, and every 30 s in any case, the leases are read and compared; a lost operation may still arrive
late, so comparing goes on for some seconds. Every
30 s the model's totals are worked out anew from all leases, in case somebody changed them by hand.
Peers that have been silent for long are reaped on the way.
"""

import asyncio
from collections.abc import Mapping, Sequence
from random import Random
from typing import Final, Protocol

import structlog

from services.proxy.metrics import Metrics
from services.proxy.reservations import RESERVE_DEADLINE_S
from services.proxy.serving import Fleet, Served
from shared.errors import RegistryError
from shared.models.routing import Beat, Lease
from shared.registry.ledger import ReapReply, RecountReply

BEAT_S: Final = 1.0
AWAY_BEAT_S: Final = 0.5
"""While the ledger is away beats are what finds it again, and there is nothing else to ask it."""
BEAT_JITTER: Final = 0.2
COMPARE_S: Final = 30.0
WARY_S: Final = 5.0
"""For so long after operations were lost they may still be executed: the network had them."""
REAP_ROUNDS: Final = 100

_log = structlog.get_logger(__name__)


class BeatLedger(Protocol):
    """The part of the registry's ledger that is needed here."""

    async def beat(self, model: str, proxy: str, waiting: int = 0) -> Beat:
        """Say that `proxy` serves `model`."""
        ...

    async def leases(self, model: str, proxy: str) -> Mapping[str, Lease]:
        """Read what Redis holds for a proxy."""
        ...

    async def suspects(self, model: str) -> Sequence[str]:
        """Name the proxies to reap."""
        ...

    async def reap(self, model: str, proxy: str) -> ReapReply:
        """Drop some of what a dead proxy held."""
        ...

    async def recount(self, model: str, holders: Sequence[str]) -> RecountReply:
        """Work out all totals anew."""
        ...


class Beats:
    """The beats of one proxy, for all its models."""

    def __init__(
        self, *, proxy: str, fleet: Fleet, ledger: BeatLedger, metrics: Metrics, random: Random
    ) -> None:
        self._proxy = proxy
        self._fleet = fleet
        self._ledger = ledger
        self._metrics = metrics
        self._random = random
        self._compared_s: dict[str, float] = {}
        self._wary_until_s: dict[str, float] = {}

    def interval_s(self) -> float:
        """Return the time to the next beat."""
        away = any(served.reservations.breaker.open for served in self._fleet.served())
        beat_s = AWAY_BEAT_S if away else BEAT_S
        return beat_s * self._random.uniform(1 - BEAT_JITTER, 1 + BEAT_JITTER)

    async def beat_all(self) -> None:
        """Beat once for every model."""
        async with asyncio.TaskGroup() as group:
            for served in self._fleet.served():
                group.create_task(self.beat(served))

    async def beat(self, served: Served) -> None:
        """Beat once for one model, and do what the answer asks for."""
        reservations = served.reservations
        breaker = reservations.breaker
        sent_s = self._fleet.now_s()
        try:
            beat = await self._ledger.beat(served.model, self._proxy, served.room.waiting)
        except RegistryError:
            # Whoever answers next may have forgotten something, and counts can be equal by chance.
            reservations.dirty = True
            if breaker.errored(self._fleet.now_s()):
                reservations.opened()
            return
        now_s = self._fleet.now_s()
        if now_s - sent_s <= RESERVE_DEADLINE_S:
            if breaker.fast_beat():
                _log.info("ledger_back", model=served.model)
        elif breaker.missed(now_s):
            reservations.opened()
        if not served.table.knows(beat.ver):
            self._fleet.saw_version(served.model)
            if beat.ver < served.table.ver:  # it has forgotten this, so it may have forgotten more
                reservations.dirty = True
        if breaker.open:
            return
        await self._keep_true(served, beat, now_s)

    async def _keep_true(self, served: Served, beat: Beat, now_s: float) -> None:
        """Compare and repair where the beat says that something may be wrong."""
        reservations = served.reservations
        drift = beat.leases - len(reservations.live)
        known_drift = 0 if abs(drift) <= len(reservations.unsettled) else drift
        self._metrics.drift.labels(served.model).set(known_drift)
        forgotten = not beat.known and len(reservations.live) > 0
        due = now_s - self._compared_s.get(served.model, 0.0) >= COMPARE_S
        if reservations.dirty:
            self._wary_until_s[served.model] = now_s + WARY_S
        wary = now_s < self._wary_until_s.get(served.model, 0.0)
        try:
            if wary or known_drift or forgotten or due:
                await self._compare(served, now_s)
            if due:
                await self._recount(served.model)
            if beat.silent:
                await self._reap(served.model)
        except RegistryError as error:
            reservations.dirty = True
            _log.warning("ledger_not_compared", model=served.model, error=str(error))

    async def _compare(self, served: Served, now_s: float) -> None:
        reservations = served.reservations
        # Cleared before the read: what goes wrong from here on asks for another comparison.
        reservations.dirty = False
        unsettled = set(reservations.unsettled)
        leases = await self._ledger.leases(served.model, self._proxy)
        unsettled.update(reservations.unsettled)
        repair = reservations.live.compare(leases, unsettled)
        self._compared_s[served.model] = now_s
        count = len(repair.adopt) + len(repair.release)
        if count:
            self._metrics.repairs.labels(served.model).inc(count)
            _log.info(
                "ledger_repaired",
                model=served.model,
                adopted=len(repair.adopt),
                released=len(repair.release),
            )
            reservations.repair(repair.adopt, repair.release)

    async def _recount(self, model: str) -> None:
        reply = await self._ledger.recount(model, (self._proxy,))
        if reply.corrected:
            self._metrics.recounted.labels(model).inc(reply.corrected)
            _log.warning("ledger_recounted", model=model, corrected=reply.corrected)

    async def _reap(self, model: str) -> None:
        for peer in await self._ledger.suspects(model):
            if peer == self._proxy:
                continue
            dropped = 0
            for _ in range(REAP_ROUNDS):
                reply = await self._ledger.reap(model, peer)
                dropped += reply.dropped
                if reply.alive or reply.left <= 0:
                    break
            if dropped:
                _log.warning("proxy_reaped", model=model, proxy=peer, dropped=dropped)
