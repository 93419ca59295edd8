"""Reserving and releasing: one batch per turn of the event loop, and never a wait on Redis.

All operations that one turn of the loop produces for a model travel in one call (at most 64
operations, at most two calls under way); releases wait some milliseconds for a reserve to travel
with, and a reserve for nothing where reserves have come one by one. A reserve that is not answered
within 100 ms is decided locally; when its answer comes after all, the ledger is moved to what was
decided. After misses or errors the breaker opens: everything is decided locally at once, and
`dirty` asks the next beat after Redis' return to repair the ledger from the live requests.

Operations of one request never overtake each other: while one is under way, the next waits.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from time import perf_counter
from typing import Final, Protocol

import structlog

from services.proxy.breaker import RedisBreaker
from services.proxy.live import Holding, LiveRequests
from services.proxy.metrics import LedgerMetrics
from shared.errors import RegistryError
from shared.registry.ledger import (
    BUSY,
    MAX_CANDIDATES,
    NONE,
    TIE_BITS,
    Adopt,
    BatchReply,
    OnBatchReply,
    Op,
    Release,
    Reserve,
)

RESERVE_DEADLINE_S: Final = 0.1
BATCH_LIMIT: Final = 64
BATCHES_UNDER_WAY: Final = 2
LINGER_S: Final = 0.005
"""A release without a reserve to travel with waits this long for one: under light load that halves
the calls, and nobody waits for a release."""

LONE_CALLS: Final = 3
"""After so many calls in a row with one reserve each, the next one does not wait for the end of its
turn either: nobody would travel with it."""

_NOBODY: Final = frozenset({BUSY, NONE})

_log = structlog.get_logger(__name__)

Answer = Callable[[str], None]
"""Called with a replica id, `ledger.BUSY` or `ledger.NONE`."""


class BatchLedger(Protocol):
    """The part of the registry's ledger that is needed here."""

    def submit(self, model: str, proxy: str, ops: Sequence[Op], on_reply: OnBatchReply) -> None:
        """Run up to 64 operations as one atomic step; `on_reply` is called once, later."""
        ...


class _Entry:
    """One operation on its way to the ledger."""

    __slots__ = ("answer", "asked_s", "began_s", "op", "request")

    def __init__(
        self,
        op: Op,
        answer: Answer | None = None,
        asked_s: float = 0.0,
        began_s: float = 0.0,
    ) -> None:
        self.request = op.request
        self.op = op
        self.answer = answer
        """Who waits for a replica; nobody any more once one was given."""
        self.asked_s = asked_s
        self.began_s = began_s
        """The same on a finer clock: the loop's tells milliseconds, and a choice takes less."""


class Reservations:
    """The reservations of one model in this proxy."""

    def __init__(
        self,
        *,
        model: str,
        proxy: str,
        ledger: BatchLedger,
        breaker: RedisBreaker,
        choose_locally: Callable[[Sequence[str]], str],
        saw_version: Callable[[int], None],
        metrics: LedgerMetrics,
        random: Random,
    ) -> None:
        self._model = model
        self._proxy = proxy
        self._ledger = ledger
        self._choose_locally = choose_locally
        self._saw_version = saw_version
        self._metrics = metrics
        self._random = random
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Entry] = deque()
        self._deferred: dict[str, list[_Entry]] = {}
        self._flying: set[str] = set()
        self._unsettled: dict[str, int] = {}
        self._undecided: deque[_Entry] = deque()
        self._deadline: asyncio.TimerHandle | None = None
        self._flush_due = False
        self._urgent = False
        self._lingering: asyncio.TimerHandle | None = None
        self._under_way = 0
        self._lone = 0
        """Calls in a row that had one reserve; those without any do not count."""
        self._landing: asyncio.Future[None] | None = None
        self._closed = False
        self.breaker = breaker
        self.live = LiveRequests()
        self.dirty = False
        """The ledger may differ from the live requests: compare as soon as possible."""

    @property
    def unsettled(self) -> dict[str, int]:
        """Requests with operations under way, and how many."""
        return self._unsettled

    def reserve(
        self,
        request: str,
        cost_tokens: int,
        exclude: tuple[str, ...],
        answer: Answer,
        affinity: tuple[tuple[str, int], ...] = (),
    ) -> None:
        """Reserve a replica for `request`; `answer` is called once, maybe before this returns.

        `request` must be new for every try, so that tries cannot be confused. `affinity` names
        replicas on which it costs less, and what it costs there.
        """
        now_s = self._loop.time()
        op = Reserve(request, cost_tokens, self._random.getrandbits(TIE_BITS), affinity, exclude)
        entry = _Entry(op, answer, now_s, perf_counter())
        if self.breaker.open:
            self._decide_locally(entry)
            return
        if len(exclude) > MAX_CANDIDATES:
            # The ledger heeds no more of them, and would name the same ones for ever.
            self._decide_locally(entry)
            if (holding := self.live.get(request)) is not None:
                self._tell(Adopt(request, holding.rid, holding.cost_tokens))
            return
        self._undecided.append(entry)
        if self._deadline is None:
            self._deadline = self._loop.call_at(now_s + RESERVE_DEADLINE_S, self._decide_overdue)
        self._urgent = True
        self._enqueue(entry)

    def release(self, request: str) -> None:
        """End the holding of `request`; nothing happens if it has none."""
        if self.live.remove(request) is None:
            return
        if self.breaker.open:
            self.dirty = True
        else:
            self._enqueue(_Entry(Release(request)))

    def settle(self, request: str, cost_tokens: int) -> None:
        """Change what `request` holds: it streams, so its prompt has been worked off."""
        holding = self.live.get(request)
        if holding is None:
            return
        holding.streamed = True
        if holding.cost_tokens != cost_tokens:
            holding.cost_tokens = cost_tokens
            self._tell(Adopt(request, holding.rid, cost_tokens))

    def repair(self, adopt: Sequence[tuple[str, Holding]], release: Sequence[str]) -> None:
        """Send what a comparison with the ledger found."""
        for request, holding in adopt:
            self._tell(Adopt(request, holding.rid, holding.cost_tokens))
        for request in release:
            self._tell(Release(request))

    async def flushed(self, deadline_s: float) -> None:
        """Wait until nothing is under way, at most `deadline_s` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while self._queue or self._under_way:
                    self._flush()
                    if self._under_way:
                        self._landing = self._loop.create_future()
                        await self._landing

    async def aclose(self) -> None:
        """Forget what is under way."""
        self._closed = True
        for timer in (self._deadline, self._lingering):
            if timer is not None:
                timer.cancel()

    def opened(self) -> None:
        """Decide everything that waits locally: the breaker has just opened."""
        self.dirty = True
        self._metrics.breaker_open.set(1)
        _log.warning("ledger_away", model=self._model)
        queue, self._queue = self._queue, deque()
        entries = [*queue, *(entry for later in self._deferred.values() for entry in later)]
        self._deferred.clear()
        for entry in entries:
            self._settled(entry.request)
            self._decide_locally(entry)
        # Those under way too: should their answers come after all, the ledger is moved to what
        # was decided here.
        undecided, self._undecided = self._undecided, deque()
        for entry in undecided:
            self._decide_locally(entry)

    # the way to the ledger

    def _tell(self, op: Op) -> None:
        if self.breaker.open:
            self.dirty = True
            return
        self._enqueue(_Entry(op))

    def _enqueue(self, entry: _Entry) -> None:
        self._unsettled[entry.request] = self._unsettled.get(entry.request, 0) + 1
        self._queue.append(entry)
        if not self._flush_due:
            self._plan_flush()

    def _plan_flush(self) -> None:
        """Send reserves with this turn of the loop; let others wait a little for company."""
        if self._urgent or len(self._queue) >= BATCH_LIMIT:
            if self._lone >= LONE_CALLS and not self._under_way:
                self._flush()
            elif not self._flush_due:
                self._flush_due = True
                self._loop.call_soon(self._flush)
        elif self._lingering is None:
            self._lingering = self._loop.call_later(LINGER_S, self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        while self._queue and self._under_way < BATCHES_UNDER_WAY and not self._closed:
            batch = self._take()
            if not batch:
                return
            self._under_way += 1
            self._ledger.submit(
                self._model,
                self._proxy,
                [entry.op for entry in batch],
                partial(self._landed, batch, self._loop.time()),
            )

    def _take(self) -> list[_Entry]:
        batch: list[_Entry] = []
        reserves = 0
        queue, flying = self._queue, self._flying
        while queue and len(batch) < BATCH_LIMIT:
            entry = queue.popleft()
            if entry.request in flying:
                self._deferred.setdefault(entry.request, []).append(entry)
                continue
            if entry.answer is None and isinstance(entry.op, Reserve):
                # Decided locally while it waited: tell the ledger the decision instead.
                holding = self.live.get(entry.request)
                if holding is None:
                    self._settled(entry.request)
                    continue
                entry.op = Adopt(entry.request, holding.rid, holding.cost_tokens)
            elif entry.answer is not None:
                reserves += 1
            batch.append(entry)
        if not queue:
            self._urgent = False
        if reserves:  # one that another call is still under way beside came in company, too
            self._lone = self._lone + 1 if reserves == 1 and not self._under_way else 0
        flying.update([entry.request for entry in batch])
        return batch

    def _landed(
        self, batch: list[_Entry], sent_s: float, reply: BatchReply | RegistryError
    ) -> None:
        """Take a batch back that was answered, or failed."""
        self._under_way -= 1
        if self._closed:
            return
        flying, unsettled = self._flying, self._unsettled
        for entry in batch:
            request = entry.request
            flying.discard(request)
            if (count := unsettled.pop(request)) > 1:
                unsettled[request] = count - 1
        if self._deferred:
            for entry in batch:
                later = self._deferred.pop(entry.request, None)
                if later:
                    self._queue.extend(later)
        if isinstance(reply, RegistryError):
            self._failed(batch, reply)
        else:
            self._answered(batch, reply, sent_s)
        if self._queue:
            self._plan_flush()
        if self._landing is not None and not self._landing.done():
            self._landing.set_result(None)

    def _settled(self, request: str) -> None:
        count = self._unsettled.pop(request)
        if count > 1:
            self._unsettled[request] = count - 1

    # what comes back

    def _answered(self, batch: list[_Entry], reply: BatchReply, sent_s: float) -> None:
        now_s = self._loop.time()
        if now_s - sent_s <= RESERVE_DEADLINE_S:
            self.breaker.answered()
        for entry, result in zip(batch, reply.results, strict=True):
            if entry.answer is not None:
                self._give(entry, str(result), now_s)
            elif isinstance(entry.op, Reserve):
                self._overtaken(entry.request, str(result))
        self._metrics.batch_ops.observe(len(batch))
        self._metrics.batch_s.observe(now_s - sent_s)
        self._saw_version(reply.ver)

    def _overtaken(self, request: str, result: str) -> None:
        """Move the ledger to the local decision that its answer came too late for."""
        holding = self.live.get(request)
        if holding is None:
            if result not in _NOBODY:
                self._tell(Release(request))
        elif holding.rid != result:
            self._tell(Adopt(request, holding.rid, holding.cost_tokens))

    def _failed(self, batch: list[_Entry], error: RegistryError) -> None:
        self.dirty = True
        self._metrics.errors.inc()
        if self.breaker.errored(self._loop.time()):
            _log.warning("ledger_failed", model=self._model, error=str(error))
            self.opened()
        for entry in batch:
            self._decide_locally(entry)

    def _decide_overdue(self) -> None:
        self._deadline = None
        now_s = self._loop.time()
        missed = False
        while self._undecided:
            entry = self._undecided[0]
            if entry.answer is not None:
                deadline_s = entry.asked_s + RESERVE_DEADLINE_S
                if deadline_s > now_s:
                    self._deadline = self._loop.call_at(deadline_s, self._decide_overdue)
                    break
                missed = True
                self._decide_locally(entry)
            self._undecided.popleft()
        if missed:
            self._metrics.misses.inc()
            if self.breaker.missed(now_s):
                self.opened()

    def _decide_locally(self, entry: _Entry) -> None:
        if entry.answer is None:
            return
        self._metrics.local_choices.inc()
        op = entry.op
        choice = self._choose_locally(op.exclude if isinstance(op, Reserve) else ())
        self._give(entry, choice, self._loop.time())

    def _give(self, entry: _Entry, result: str, now_s: float) -> None:
        answer, op = entry.answer, entry.op
        if answer is None or not isinstance(op, Reserve):
            return
        entry.answer = None
        self._metrics.choice_s.observe(perf_counter() - entry.began_s)
        if result not in _NOBODY:
            cost_tokens = op.cost_on(result) if op.affinity else op.cost_tokens
            self.live.add(entry.request, Holding(result, cost_tokens, now_s))
        answer(result)
