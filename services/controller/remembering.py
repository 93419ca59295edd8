"""The controllers' part in rebuilding what is declared after Redis has lost it.

Every controller remembers, whether it leads or not, so that the loss of Redis and of the leader at
once loses nothing. No fence guards this: a declaration is an operator's word, guarded by its
generation.
"""

from typing import Final

import structlog

from shared.clock import Clock
from shared.errors import RegistryError
from shared.lifecycle import every
from shared.models.event import Event, EventLevel
from shared.registry import Registry
from shared.registry.memory import Memory

REMEMBER_S: Final = 1.0

_log = structlog.get_logger(__name__)


async def remember(registry: Registry, clock: Clock, owner: str) -> None:
    """Read what is declared each second, and declare again what was lost, for ever."""
    memory = Memory(registry.fleet)

    async def refresh() -> None:
        try:
            for model in await memory.refresh():
                await registry.fleet.emit(
                    Event(
                        kind="DeploymentRestored",
                        subject=f"deployment/{model}",
                        message="Redis had lost what was declared: declared again from memory",
                        level=EventLevel.WARNING,
                        source=f"controller/{owner}",
                        at_ms=clock.now_ms(),
                    )
                )
        except RegistryError as error:
            _log.debug("declarations_not_read", error=str(error))

    await every(lambda: REMEMBER_S, refresh)
