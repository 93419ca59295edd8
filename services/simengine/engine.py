"""The step loop: one timer drives every running request of this engine.

It takes the scheduler's plan, lets the step's time pass, then gives each due run its next token
and its sink the text to show. There is no task and no timer per request.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

import msgspec

from services.simengine import text
from services.simengine.choosing import Chooser
from services.simengine.detokenizer import Detokenizer
from services.simengine.faults import FaultOrder, Faults
from services.simengine.metrics import EngineMetrics
from services.simengine.refusals import RefusalError, busy, dead
from services.simengine.scheduler import Scheduler, SequenceState, Step
from services.simengine.scheduler import Sequence as Scheduled

CRASH_EXIT_CODE = 70


class RunSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How one run goes on and ends. `pooling` computes the prompt and generates nothing."""

    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    greedy: bool = True
    seed: int | None = None
    pooling: bool = False


class Run:
    """One prompt being answered: choice `index` of one request."""

    __slots__ = (
        "chooser",
        "detokenizer",
        "first_token_s",
        "index",
        "last_token_s",
        "produced",
        "scheduled",
        "settings",
        "sink",
    )

    def __init__(
        self,
        index: int,
        scheduled: Scheduled,
        settings: RunSettings,
        sink: "Sink",
        *,
        mean_answer_tokens: int,
        noise: Random,
    ) -> None:
        self.index = index
        self.scheduled = scheduled
        self.settings = settings
        self.sink = sink
        self.produced = 0
        self.first_token_s = 0.0
        self.last_token_s = 0.0
        self.chooser = Chooser(
            scheduled.ids,
            mean_answer_tokens=mean_answer_tokens,
            seed=None if settings.greedy else settings.seed,
            noise=None if settings.greedy else noise,
        )
        self.detokenizer = Detokenizer(
            scheduled.ids,
            stops=settings.stops,
            include_stop=settings.include_stop,
            skip_special=settings.skip_special,
            min_tokens=settings.min_tokens,
        )


class Sink(Protocol):
    """Where a request's tokens go. One sink serves all runs of a request."""

    name: str
    """What the answer's `id` says."""

    def token(
        self, run: Run, token_id: int, shown: str, finish: str | None, stop: str | int | None
    ) -> None:
        """Take one token and the text that may be shown now; `finish` says why it is the last."""
        ...

    def fail(self, error: RefusalError) -> None:
        """Tell the client that the engine has died."""
        ...

    def cut(self) -> None:
        """Drop the client's connection."""
        ...


class Engine:
    """Owns the scheduler, the clock of its steps, and the faults."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        scheduler: Scheduler,
        metrics: EngineMetrics,
        *,
        faults: Faults,
        on_dead: Callable[[], None],
        exit_process: Callable[[int], None] = os._exit,
    ) -> None:
        self._loop = loop
        self.scheduler = scheduler
        self.metrics = metrics
        self.faults = faults
        self._on_dead = on_dead
        self._exit_process = exit_process
        self._runs: dict[Scheduled, Run] = {}
        self._step: Step | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.idle = asyncio.Event()
        """Set while nothing is in flight."""
        self.idle.set()

    @property
    def in_flight(self) -> list[Run]:
        """The runs that are running or waiting."""
        return list(self._runs.values())

    @property
    def is_dead(self) -> bool:
        """True once the engine core has died; /health then says 503."""
        return self.faults.engine_dead

    def scheduler_now_s(self) -> float:
        """Return the clock that arrivals and steps are measured by."""
        return self._loop.time()

    def submit(self, runs: Sequence[Run]) -> None:
        """Admit all runs of a request or none; raises the refusal of a full or dead engine."""
        if self.faults.engine_dead:
            raise dead()
        prompt_tokens = sum(run.scheduled.prompt_tokens for run in runs)
        rejection = self.scheduler.rejection(prompt_tokens, sequences=len(runs))
        if rejection is not None:
            self.metrics.rejected[rejection.value] += 1
            raise busy()
        if self.faults.take_rejection():
            self.metrics.rejected["max_num_queued_reqs"] += 1
            raise busy()
        for run in runs:
            self._runs[run.scheduled] = run
            self.scheduler.add(run.scheduled)
        self.idle.clear()
        if self._step is None:
            self._begin()

    def abort(self, runs: Sequence[Run]) -> None:
        """Drop runs whose client has gone and free what they held."""
        for run in runs:
            self._runs.pop(run.scheduled, None)
            self.scheduler.remove(run.scheduled)
        if not self._runs:
            self.idle.set()
        if self._step is None:
            self._publish()

    def inject(self, order: FaultOrder) -> None:
        """Put a fault in force now."""
        self.faults.apply(order)
        self.resume()

    def resume(self) -> None:
        """Act on the faults in force: die, crash, or go on where the loop stood."""
        if self.faults.engine_dead:
            self._die()
            return
        if self.faults.crash_after_tokens == 0:
            self._crash()
            return
        if self._timer is None and not self.faults.frozen:
            if self._step is not None:
                self._finish()
            else:
                self._begin()

    def stop(self) -> None:
        """Stop the loop for good."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._step = None

    def _begin(self) -> None:
        self._step = None
        if self.faults.frozen or self.faults.engine_dead:
            return
        now_s = self._loop.time()
        self._step = self.scheduler.plan(now_s)
        self._publish()
        if self._step is not None:
            until_s = now_s + self._step.duration_s * self.faults.slow_factor
            self._timer = self._loop.call_at(until_s, self._finish)

    def _finish(self) -> None:
        self._timer = None
        step = self._step
        if step is None or self.faults.frozen:
            return
        now_s = self._loop.time()
        due = self.scheduler.complete(step)
        for scheduled in due:
            if scheduled.state is SequenceState.RUNNING:
                self._advance(self._runs[scheduled], now_s)
                if self.faults.crash_after_tokens is not None and self._count_to_crash():
                    return
        self.metrics.step_tokens.observe(sum(tokens for _, tokens in step.work))
        self._begin()

    def _advance(self, run: Run, now_s: float) -> None:
        settings = run.settings
        if settings.pooling:
            self._end(run, "stop", now_s)
            run.sink.token(run, text.EOS, "", "stop", None)
            return
        may_end = run.produced >= settings.min_tokens
        token = run.chooser.next_id(may_end=may_end)
        self.scheduler.append(run.scheduled, token)
        run.produced += 1
        finish: str | None = None
        stop: str | int | None = None
        silent = False
        if token == text.EOS and not settings.ignore_eos:
            finish, silent = "stop", True
        elif may_end and token in settings.stop_token_ids:
            finish, stop, silent = "stop", token, not settings.include_stop
        found = run.detokenizer.push(token, silent=silent)
        if finish is None:
            if found is not None:
                finish, stop = "stop", found
            elif (
                run.produced >= settings.max_tokens
                or len(run.scheduled.ids) >= self.scheduler.limits.max_model_len
            ):
                finish = "length"
        shown = run.detokenizer.take(finished=finish is not None)
        self._measure(run, now_s)
        if finish is not None:
            self._end(run, finish, now_s)
        run.sink.token(run, token, shown, finish, stop)
        if self.faults.cut_after_tokens is not None and self.faults.take_cut(run.produced):
            run.sink.cut()

    def _measure(self, run: Run, now_s: float) -> None:
        self.metrics.generation_tokens += 1
        if run.produced == 1:
            run.first_token_s = now_s
            self.metrics.prompt_tokens += run.scheduled.prompt_tokens
            self.metrics.first_token_s.observe(now_s - run.scheduled.arrived_s)
        else:
            self.metrics.between_tokens_s.observe(now_s - run.last_token_s)
        run.last_token_s = now_s

    def _end(self, run: Run, finish: str, now_s: float) -> None:
        self.scheduler.remove(run.scheduled)
        del self._runs[run.scheduled]
        if not self._runs:
            self.idle.set()
        metrics, scheduled = self.metrics, run.scheduled
        metrics.finished[finish] += 1
        started_s = scheduled.arrived_s if scheduled.scheduled_s is None else scheduled.scheduled_s
        first_s = run.first_token_s or now_s
        metrics.request_s.observe(now_s - scheduled.arrived_s)
        metrics.queue_s.observe(started_s - scheduled.arrived_s)
        metrics.prefill_s.observe(first_s - started_s)
        metrics.decode_s.observe(now_s - first_s)
        metrics.inference_s.observe(now_s - started_s)
        if run.produced > 1:
            metrics.per_token_s.observe((now_s - first_s) / (run.produced - 1))

    def _publish(self) -> None:
        if self.faults.frozen:
            return
        metrics, scheduler = self.metrics, self.scheduler
        metrics.running = scheduler.running
        metrics.waiting = scheduler.waiting
        metrics.kv_usage = scheduler.kv_usage
        metrics.preemptions = scheduler.preemptions
        metrics.prefix_queried_tokens = scheduler.prefix_queried_tokens
        metrics.prefix_hit_tokens = scheduler.prefix_hit_tokens

    def _count_to_crash(self) -> bool:
        left = self.faults.crash_after_tokens
        if left is None:
            return False
        self.faults.crash_after_tokens = left = left - 1
        if left > 0:
            return False
        self._crash()
        return True

    def _crash(self) -> None:
        # One turn later, so that what was written before the crash has left this process.
        self.stop()
        self.faults.frozen = True
        self._loop.call_soon(self._loop.call_soon, self._exit_process, CRASH_EXIT_CODE)

    def _die(self) -> None:
        self.stop()
        runs = self.in_flight
        self._runs.clear()
        for run in runs:
            self.scheduler.remove(run.scheduled)
        for sink in dict.fromkeys(run.sink for run in runs):
            sink.fail(dead())
        self._on_dead()
