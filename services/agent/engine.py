"""One engine of this host, from its start to its end, as its agent sees it.

An engine is a process tree that the agent started or adopted, or an external server that it only
probes. `run` lives as long as the engine does: it waits until the engine is warm, watches it, and
cleans up after it. Cancelling `run` leaves the engine alone: engines outlive the agent.

An engine says what it sees by `view`; what follows from that is decided in `reconcile`.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import structlog

from services.agent import health, probe
from services.agent.health import Health
from services.agent.probe import Endpoint, Load
from services.agent.process import EXITED, EngineProcess
from services.agent.reconcile import EngineView, Phase
from services.agent.settings import AgentSettings
from services.agent.statefile import EngineFolders
from services.agent.telemetry import Telemetry
from shared.clock import Clock
from shared.models.deployment import EngineKind
from shared.models.order import Order

_log = structlog.get_logger(__name__)

STARTUP_POLL_S: Final = 0.25
UP_DEADLINE_S: Final = 2.0
WARM_UP_DEADLINE_S: Final = 120.0
"""The first request of a fresh engine may compile kernels."""
DRAIN_POLL_S: Final = 0.5
LOOK_AROUND_S: Final = 10.0
TEARDOWN_S: Final = 15.0
"""What a drained vLLM takes to tear itself down, beyond its shutdown timeout."""
LONGEST_BACKOFF_S: Final = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """What every engine of an agent works with."""

    settings: AgentSettings
    clock: Clock
    folders: EngineFolders
    telemetry: Telemetry
    changed: Callable[[], None]
    """Called when an engine's phase changes: there may be something to do."""


class Engine:
    """The life of one engine; without a `process` it is an external server, or never started."""

    def __init__(
        self,
        *,
        order: Order,
        endpoint: Endpoint,
        phase: Phase,
        process: EngineProcess | None,
        tools: Tools,
        port: int = 0,
        restarts: int = 0,
        reason: str = "",
    ) -> None:
        self.order = order
        self.endpoint = endpoint
        self.port = port
        self.restarts = restarts
        self.load = Load()
        self.context_tokens = 0
        self.reserved: int | None = None
        """Requests the ledger holds on this replica, read since draining began."""
        self.orphan_since_s: float | None = None
        self.phase = phase
        self.reason = reason
        self._process = process
        self._leftovers: Callable[[], Awaitable[None]] | None = None
        self._folders = tools.folders
        self._settings = tools.settings
        self._clock = tools.clock
        self._telemetry = tools.telemetry
        self._changed = tools.changed
        self._health = Health()
        self._stop_asked = asyncio.Event()
        self._drain_asked = asyncio.Event()
        self._draining_since_s: float | None = None
        self._drain_timeout_s = 0.0
        self._idle_load = False
        self._wanted_end = False
        self._clean = False
        self._restart_at_s = self._clock.monotonic_s() + backoff_s(restarts)
        self._look_around_at_s = 0.0
        self._started_s = self._clock.monotonic_s()

    @property
    def kind(self) -> EngineKind:
        """Who runs it."""
        return self.order.spec.engine.kind

    @property
    def beats(self) -> bool:
        """Tell whether the agent vouches for it by heartbeats."""
        return self.phase is not Phase.ENDED

    def view(self) -> EngineView:
        """Say how it stands now."""
        idle = self.phase is Phase.STARTING or (
            self.reserved == 0 and (self._idle_load or self.kind is EngineKind.EXTERNAL)
        )
        return EngineView(
            rid=self.order.rid,
            model=self.order.model,
            gen=self.order.gen,
            kind=self.kind,
            phase=self.phase,
            url=self.endpoint.url,
            pid=self._process.file.pid if self._process else 0,
            reason=self.reason,
            wanted_end=self._wanted_end,
            clean=self._clean,
            restart_at_s=self._restart_at_s,
            draining_since_s=self._draining_since_s,
            drain_timeout_s=self._drain_timeout_s,
            idle=self._draining_since_s is not None and idle,
            orphan_since_s=self.orphan_since_s,
        )

    def drain(self, timeout_s: float, why: str) -> None:
        """Begin to wait until nothing is in flight, at most `timeout_s` seconds."""
        if self._draining_since_s is None:
            _log.info("engine_draining", rid=self.order.rid, why=why, timeout_s=timeout_s)
            self._draining_since_s = self._clock.monotonic_s()
            self._drain_timeout_s = timeout_s
            self._drain_asked.set()

    @property
    def draining(self) -> bool:
        """It waits for what is in flight."""
        return self._draining_since_s is not None and self.phase is not Phase.ENDED

    def stop(self, why: str) -> None:
        """Have it ended; `run` does so."""
        if not self._stop_asked.is_set():
            _log.info("engine_stopping", rid=self.order.rid, why=why)
            self.reason = why
            self._stop_asked.set()

    def clean_with(self, leftovers: Callable[[], Awaitable[None]]) -> None:
        """Have `run` clean up what an engine that had ended already left behind."""
        self._leftovers = leftovers

    async def run(self) -> None:
        """See the engine through to its end; one that has ended is cleaned up."""
        if self.phase is not Phase.ENDED:
            await self._live()
            await self._finish()
        elif self._leftovers is not None:
            await self._leftovers()
        self._clean = True
        self._changed()

    async def _live(self) -> None:
        waits: list[asyncio.Task[object]] = [
            asyncio.create_task(self._probe(), name="probe"),
            asyncio.create_task(self._stop_asked.wait(), name="stop asked"),
        ]
        if self._process is not None:
            waits.append(asyncio.create_task(self._process.wait(), name="death"))
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _finish(self) -> None:
        process = self._process
        if process is not None and not process.alive:
            what = await process.wait()
            # Whoever is killed has no last words: the end of its log speaks of other things.
            said = ""
            if signal.SIGKILL.name not in what:
                exited = EXITED in what
                said = self._folders.last_words(self.order.rid, cause_only=not exited)
            self._end(f"{what}: {said}" if said else what, wanted=False)
        elif self._stop_asked.is_set():
            self._move(Phase.STOPPING, self.reason)
            if process is not None:
                await process.stop(self.order.spec.engine.shutdown_timeout_s + TEARDOWN_S)
            self._end(self.reason, wanted=True)
            return
        else:
            self._end(self.reason, wanted=False)
        if process is not None:
            await process.clean()

    async def _probe(self) -> None:
        """Probe until the engine fails to become warm in time; else for ever."""
        if self.phase is Phase.STARTING and not await self._start_up():
            return
        while True:
            await self._look()
            interval_s = self._settings.metrics_interval_s
            if self._health.misses:
                interval_s = min(interval_s, health.RETRY_S)
            if self.draining:
                await asyncio.sleep(min(DRAIN_POLL_S, interval_s))
                continue
            try:
                async with asyncio.timeout(interval_s):
                    await self._drain_asked.wait()
            except TimeoutError:
                continue

    async def _start_up(self) -> bool:
        limit_s = float(self.order.spec.engine.startup_timeout_s)
        until_s = self._started_s + limit_s
        problem: str | None = "it does not listen yet"
        while (left_s := until_s - self._clock.monotonic_s()) > 0:
            external = self.kind is EngineKind.EXTERNAL
            if external or await probe.is_up(self.endpoint, min(UP_DEADLINE_S, left_s)):
                deadline_s = self._settings.probe_deadline_s if external else WARM_UP_DEADLINE_S
                problem = await probe.complaint(
                    self.endpoint, self.order.spec, min(deadline_s, left_s)
                )
            if problem is None:
                self.context_tokens = await probe.read_context_tokens(self.endpoint)
                if self._process is not None:
                    self._process.note_warm()
                took_s = self._clock.monotonic_s() - self._started_s
                _log.info("engine_ready", rid=self.order.rid, took_s=round(took_s, 2))
                self._move(Phase.READY, "")
                return True
            await asyncio.sleep(STARTUP_POLL_S)
        self.reason = f"not ready within {limit_s:g} s (engine.startup_timeout_s): {problem}"
        return False

    async def _look(self) -> None:
        now_s = self._clock.monotonic_s()
        draining = self.draining
        if self._process is not None and now_s >= self._look_around_at_s:
            self._process.look_around()
            self._look_around_at_s = now_s + LOOK_AROUND_S
        load = None if self.kind is EngineKind.EXTERNAL else await probe.read_load(self.endpoint)
        if load is not None:
            self.load = load
            was_idle = self._idle_load
            self._idle_load = draining and load.running + load.waiting == 0
            if self._idle_load and not was_idle:
                self._changed()
        if now_s >= self._health.due_s:
            await self._judge(load)

    async def _judge(self, load: Load | None) -> None:
        progress = load.progress if load is not None else self._health.progress
        problem: str | None = None
        if not health.progressed(self._health, progress):
            problem, progress = await self._ask(progress, again=load is not None)
        self._health = health.judge(
            self._health,
            well=problem is None,
            progress=progress,
            now_s=self._clock.monotonic_s(),
            interval_s=self._settings.probe_interval_s,
            misses=self._settings.probe_misses,
        )
        if problem is not None:
            self._telemetry.probe_misses.inc()
            _log.warning("probe_missed", rid=self.order.rid, problem=problem)
        if self._health.healthy and self.phase is Phase.UNHEALTHY:
            self._move(Phase.READY, "")
        elif not self._health.healthy and self.phase is Phase.READY:
            self._move(Phase.UNHEALTHY, f"{self._health.misses} probes missed: {problem}")

    async def _ask(self, progress: float, *, again: bool) -> tuple[str | None, float]:
        """Probe. With `again`, a probe that waited behind work that went on is no miss."""
        began_s = self._clock.monotonic_s()
        problem = await probe.complaint(
            self.endpoint, self.order.spec, self._settings.probe_deadline_s
        )
        if problem is None:
            self._telemetry.probe_seconds.observe(self._clock.monotonic_s() - began_s)
        after = await probe.read_load(self.endpoint) if again else None
        if after is None:
            return problem, progress
        return (None if after.progress > progress >= 0 else problem), after.progress

    def _move(self, phase: Phase, reason: str) -> None:
        self.phase = phase
        self.reason = reason
        self._changed()

    def _end(self, reason: str, *, wanted: bool) -> None:
        self._wanted_end = wanted
        self._restart_at_s = self._clock.monotonic_s() + backoff_s(self.restarts)
        if not wanted:
            self._telemetry.engine_failures.inc()
            _log.error("engine_failed", rid=self.order.rid, reason=reason)
        self._move(Phase.ENDED, reason)


def backoff_s(restarts: int) -> float:
    """Return how long to wait before restart number `restarts` + 1: 0, 1, 2, 4 … 60 seconds."""
    return min(LONGEST_BACKOFF_S, 2.0 ** (restarts - 1)) if restarts else 0.0
