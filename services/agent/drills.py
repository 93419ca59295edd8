"""Carries out drills: kills, freezes and thaws an engine of this host when an operator wishes so.

Only where the agent's own setting permits it, so that who can write to Redis cannot kill engines of
a host whose owner did not agree. A wish names one incarnation, is taken at most once, and is void
after five seconds. A frozen engine is thawed when its time is over, and when this agent ends.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from services.agent.reconcile import EngineView, Phase
from shared.clock import Clock
from shared.errors import RegistryError
from shared.models.drill import DrillAct, DrillWish
from shared.models.event import Event, EventLevel
from shared.registry import Registry

_log = structlog.get_logger(__name__)

LOOK_S: Final = 0.25
LONGEST_HOLD_S: Final = 600.0
DONE: Final = "DrillStruck"
REFUSED: Final = "DrillRefused"
"""Kinds of the events that answer a wish; the subject is `drill/<id>`."""


class Drills:
    """The drills of one host's agent."""

    def __init__(self, clock: Clock, host: str) -> None:
        self._clock = clock
        self._host = host
        self._frozen: dict[int, float] = {}
        """Pid of a frozen engine → when it is thawed, by the monotonic clock."""

    async def run(
        self,
        registry: Callable[[], Registry | None],
        engines: Callable[[], Mapping[str, EngineView]],
    ) -> None:
        """Look for wishes until cancelled; then thaw what is frozen."""
        try:
            while True:
                self._thaw(self._clock.monotonic_s())
                there = registry()
                if there is not None:
                    with contextlib.suppress(RegistryError):
                        await self.look(there, engines())
                await asyncio.sleep(LOOK_S)
        finally:
            self._thaw(float("inf"))

    async def look(self, registry: Registry, engines: Mapping[str, EngineView]) -> None:
        """Take a wish, if there is one, do it, and say so in an event."""
        wish = await registry.drills.take(self._host)
        if wish is None:
            return
        problem = self._do(wish, engines.get(wish.rid))
        kind, level = (REFUSED, EventLevel.WARNING) if problem else (DONE, EventLevel.INFO)
        text = problem or f"{wish.act} of the engine of {wish.rid}, wished by {wish.by}"
        _log.warning("drill", id=wish.id, rid=wish.rid, act=wish.act.value, problem=problem)
        await registry.fleet.emit(
            Event(
                kind=kind,
                subject=f"drill/{wish.id}",
                message=text,
                level=level,
                source=f"agent/{self._host}",
            )
        )

    def _do(self, wish: DrillWish, engine: EngineView | None) -> str | None:
        if engine is None or engine.gen != wish.gen or not engine.pid:
            return f"no engine of {wish.rid}, incarnation {wish.gen}, runs on {self._host}"
        if engine.phase is Phase.ENDED:
            return f"the engine of {wish.rid} has ended"
        match wish.act:
            case DrillAct.KILL:
                _signal(engine.pid, signal.SIGKILL)
            case DrillAct.FREEZE:
                hold_s = min(max(wish.hold_s, 0.0), LONGEST_HOLD_S)
                self._frozen[engine.pid] = self._clock.monotonic_s() + hold_s
                _signal(engine.pid, signal.SIGSTOP)
            case DrillAct.THAW:
                self._frozen.pop(engine.pid, None)
                _signal(engine.pid, signal.SIGCONT)
        return None

    def _thaw(self, now_s: float) -> None:
        for pid in [pid for pid, until_s in self._frozen.items() if until_s <= now_s]:
            del self._frozen[pid]
            _signal(pid, signal.SIGCONT)


def _signal(pid: int, number: signal.Signals) -> None:
    """Signal an engine's process group, of which it is the leader."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
