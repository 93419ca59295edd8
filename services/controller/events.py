"""Tells operators what happened, once, and only while leading.

A level-triggered loop finds the same trouble every second. What it reports without doing anything
is therefore told again only when it changed, or after some minutes. The memory is this process's
own: a new leader says it once more, which tells that it saw it too.
"""

from typing import Final

import msgspec

from shared.clock import Clock
from shared.models.event import Event
from shared.registry.fleet import Fleet
from shared.registry.results import Fence, Refused

AGAIN_S: Final = 600.0
REMEMBERED: Final = 1_000


class EventLog:
    """Emits this controller's events."""

    def __init__(self, fleet: Fleet, clock: Clock, source: str) -> None:
        self._fleet = fleet
        self._clock = clock
        self._source = source
        self._told: dict[tuple[str, str], tuple[str, float]] = {}

    async def emit(self, fence: Fence, event: Event) -> Refused | None:
        """Tell it, unless another controller leads."""
        return await self._fleet.tell(
            fence, msgspec.structs.replace(event, source=self._source, at_ms=self._clock.now_ms())
        )

    async def emit_once(self, fence: Fence, event: Event) -> Refused | None:
        """Tell it unless just that was the last word on its subject lately."""
        key = (event.kind, event.subject)
        message, at_s = self._told.get(key, ("", 0.0))
        now_s = self._clock.monotonic_s()
        if message == event.message and now_s - at_s < AGAIN_S:
            return None
        refused = await self.emit(fence, event)
        if refused is not None:
            return refused
        self._told.pop(key, None)
        self._told[key] = (event.message, now_s)
        while len(self._told) > REMEMBERED:
            del self._told[next(iter(self._told))]
        return None
