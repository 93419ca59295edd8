"""Everything that one model needs at run time in this proxy, grouped: a `Served` per model.

Owns the model's reservations, its waiting room and the set of its exchanges; watches the routing
table for them. The exchanges themselves decide what happens to a request.
"""

import asyncio
from collections.abc import Callable, Sequence
from itertools import count
from random import Random
from typing import Final, Protocol

from services.proxy import refusals
from services.proxy.admission import retry_after_s
from services.proxy.breaker import RedisBreaker, ReplicaBreaker
from services.proxy.carrier.carrying import Source, Target, make_carrier
from services.proxy.cost import OutputEstimate
from services.proxy.metrics import LedgerMetrics, Metrics, ModelMetrics
from services.proxy.policies.affinity import Affinity
from services.proxy.pool import Endpoints
from services.proxy.refusals import Refusal
from services.proxy.reservations import BatchLedger, Reservations
from services.proxy.retry import Budget, Failure
from services.proxy.settings import ProxySettings
from services.proxy.table import ModelTable, Tables, choose_least_own
from services.proxy.waiting import WaitingRoom
from shared.models.replica import ReplicaState

POLL_S: Final = (0.025, 0.05)
SWEEP_S: Final = 0.25
RETRY_ALL_S: Final = 1.0
REASONS: Final = tuple(failure.value for failure in Failure)
ENDED: Final = frozenset({ReplicaState.FAILED, ReplicaState.STOPPED})
ENDED_GRACE_S: Final = 3.0
"""A stream of a replica that the table calls ended, or unhealthy, gets this long to prove it
wrong."""


class Underway(Protocol):
    """What a model needs of its exchanges: to end them by time, by the table, and at shutdown.

    A protocol, because exchanges know their model, and two modules that name each other are one.
    """

    rid: str | None
    gen: int

    def expire(self, now_s: float) -> None:
        """End it if its deadline has passed."""

    def withdraw(self, grace_s: float, *, ended: bool) -> None:
        """Its replica has ended, or stands still: give it a little time to prove otherwise."""

    def trust(self) -> None:
        """Its replica is READY: it may be as silent again as any."""

    def shut(self) -> None:
        """End it now."""


class Served:
    """One model, as this proxy serves it."""

    def __init__(
        self,
        table: ModelTable,
        reservations: Reservations,
        metrics: ModelMetrics,
        now_s: float,
    ) -> None:
        self.model = table.model
        self.table = table
        self.reservations = reservations
        self.metrics = metrics
        self.room = WaitingRoom()
        self.output = OutputEstimate()
        self.affinity = Affinity()
        self.budget = Budget(now_s)
        self.exchanges: set[Underway] = set()
        self.ejected: dict[str, ReplicaBreaker] = {}
        """Replicas to avoid: nearly always empty, so that a request looks at none of thousands."""
        self.finished_per_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._finished = 0
        self._rated_s = now_s
        self._retried_s = now_s
        self._know_ready()

    @property
    def busy(self) -> bool:
        """Tell whether a request of this model is alive or being settled."""
        return bool(self.exchanges or len(self.reservations.live) or self.reservations.unsettled)

    def full(self) -> Refusal:
        """Say to a client that there is no room for its request, and when to come again."""
        return refusals.busy(self.model, retry_after_s(self.room.waiting, self.finished_per_s))

    def waited_in_vain(self, waited_s: float) -> Refusal:
        """Say to a client that its request has waited for long enough."""
        if self.table.ready:
            return self.full()
        return refusals.nothing_ready(self.model, waited_s)

    def ejected_now(self, now_s: float) -> list[str]:
        """Name the READY replicas that are ejected now, and forget those that no longer are."""
        for rid, breaker in list(self.ejected.items()):
            if not breaker.ejected(now_s) or rid not in self.table.ready:
                del self.ejected[rid]
        return list(self.ejected)

    def finished(self, exchange: Underway, outcome: str, took_s: float, tokens: int) -> None:
        """Note that a request has ended: whoever waits first may have its place."""
        self.exchanges.discard(exchange)
        metrics = self.metrics
        metrics.outcomes[outcome].value += 1
        metrics.duration.observe(took_s)
        if tokens:
            metrics.events.value += tokens
            if outcome == "2xx":
                self.output.observe(tokens)
        self._finished += 1
        if self.room.waiting:
            # Not from here: whoever is woken may end at once, and wake the next from within.
            self._loop.call_soon(self.room.wake, 1)

    def sweep(self, now_s: float) -> None:
        """End what is overdue; measure the rate at which requests end."""
        for exchange in list(self.exchanges):
            exchange.expire(now_s)
        if now_s - self._rated_s >= 1.0:
            rate = self._finished / (now_s - self._rated_s)
            self.finished_per_s += 0.3 * (rate - self.finished_per_s)
            self._finished = 0
            self._rated_s = now_s
        if self.room.waiting and now_s - self._retried_s >= RETRY_ALL_S:
            self._retried_s = now_s
            self.room.wake_all()

    def table_changed(self) -> None:
        """Let waiting requests try, and take requests back from replicas that are lost."""
        self._know_ready()
        for exchange in list(self.exchanges):
            rid = exchange.rid
            if rid is None:
                continue
            replica = self.table.replicas.get(rid)
            if replica is None or replica.state in ENDED or replica.gen != exchange.gen:
                exchange.withdraw(ENDED_GRACE_S, ended=True)
            elif replica.state is ReplicaState.UNHEALTHY:
                exchange.withdraw(ENDED_GRACE_S, ended=False)
            elif replica.state is ReplicaState.READY:
                exchange.trust()
        if self.room.waiting:
            self.room.wake_all()

    def _know_ready(self) -> None:
        ready = self.table.ready if self.table.spec.prefix_affinity else {}
        self.affinity.update({rid: replica.capacity for rid, replica in ready.items()})


class Fleet:
    """All models of this proxy, and what their requests share."""

    def __init__(
        self,
        *,
        proxy: str,
        settings: ProxySettings,
        tables: Tables,
        ledger: BatchLedger,
        endpoints: Endpoints,
        metrics: Metrics,
        random: Random,
        saw_version: Callable[[str], None],
    ) -> None:
        self.proxy = proxy
        self.settings = settings
        self.tables = tables
        self.endpoints = endpoints
        self.metrics = metrics
        self.random = random
        self.carrier = make_carrier(asyncio.get_running_loop()) if settings.carrier else None
        """Carries streams in compiled code; None where that was not built, or is not wanted."""
        self.carry = self.carrier.offer if self.carrier is not None else _carry_nothing
        """Offers it a stream that has begun, with who reads it, who tells it, and who listens."""
        self.pumps: set[asyncio.Task[None]] = set()
        """Tasks that write to slow clients."""
        self._ledger = ledger
        self.saw_version = saw_version
        """Called with a model whose table is not what Redis has."""
        self.next_number: Callable[[], int] = count(1).__next__
        """Gives a request a number that is unique in this process, and so in the ledger."""
        self._served: dict[str, Served] = {}
        self._loop = asyncio.get_running_loop()
        self.now_s: Callable[[], float] = self._loop.time
        """Gives the loop's monotonic time."""
        tables.on_change(self._table_changed)

    def served(self) -> list[Served]:
        """Give every model that has been asked for, or that the catalogue names."""
        for table in self.tables.models():
            self.of(table)
        for model, served in list(self._served.items()):
            if self.tables.get(model) is None and not served.busy:
                del self._served[model]
        return list(self._served.values())

    def of(self, table: ModelTable) -> Served:
        """Give what serves `table`'s model."""
        served = self._served.get(table.model)
        if served is None:
            served = self._served[table.model] = self._make(table)
        elif served.table is not table:
            served.table = table  # deleted, and declared again
            served.table_changed()
        return served

    def in_flight(self) -> int:
        """Count the requests being answered."""
        return sum(len(served.exchanges) for served in self._served.values())

    async def run_sweeps(self) -> None:
        """End what is overdue, four times a second, for ever."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = self._loop.time()
            for served in list(self._served.values()):
                served.sweep(now_s)
            self.endpoints.sweep(now_s, self.tables.known_rids())

    async def run_polls(self) -> None:
        """Let the first waiting request of each model try again, every 25 to 50 ms, for ever."""
        while True:
            await asyncio.sleep(self.random.uniform(*POLL_S))
            for served in list(self._served.values()):
                if served.room.waiting:
                    served.room.wake(1)

    def collect(self) -> None:
        """Bring the gauges up to date, before they are shown."""
        now_s = self._loop.time()
        self.metrics.carried.set(0 if self.carrier is None else self.carrier.streams)
        for served in self.served():
            model = served.model
            self.metrics.in_flight.labels(model).set(len(served.exchanges))
            self.metrics.held.labels(model).set(served.room.waiting)
            self.metrics.table_version.labels(model).set(served.table.ver)
            self.metrics.ready_replicas.labels(model).set(len(served.table.ready))
            breaker = served.reservations.breaker
            self.metrics.breaker_open.labels(model).set(breaker.open)
            self.metrics.away_s.labels(model).set(breaker.away_s(now_s))

    def shut(self) -> None:
        """End every answer now, as well as it can be ended."""
        for served in self._served.values():
            for exchange in list(served.exchanges):
                exchange.shut()

    async def aclose(self, *, deadline_s: float) -> None:
        """Send the last releases, then end every task."""
        for served in self._served.values():
            await served.reservations.flushed(deadline_s)
            await served.reservations.aclose()
        pumps = list(self.pumps)
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        if self.carrier is not None:
            self.carrier.close()
        await self.endpoints.aclose()

    def _make(self, table: ModelTable) -> Served:
        model = table.model

        def choose(exclude: Sequence[str]) -> str:
            served = self._served[model]
            own = served.reservations.live.own
            return choose_least_own(served.table.ready, own, exclude, self.random)

        def saw(ver: int) -> None:
            if not self._served[model].table.knows(ver):
                self.saw_version(model)

        reservations = Reservations(
            model=model,
            proxy=self.proxy,
            ledger=self._ledger,
            breaker=RedisBreaker(),
            choose_locally=choose,
            saw_version=saw,
            metrics=LedgerMetrics(self.metrics, model),
            random=self.random,
        )
        metrics = ModelMetrics(self.metrics, model, REASONS)
        return Served(table, reservations, metrics, self._loop.time())

    def _table_changed(self, table: ModelTable) -> None:
        served = self._served.get(table.model)
        if served is not None:
            served.table_changed()


def _carry_nothing(source: Source, target: Target, listener: object) -> None:
    """Leave a stream to Python."""
    del source, target, listener
