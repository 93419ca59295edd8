"""The controllers' part in keeping the fleet's data whole, whoever leads.

What is declared is declared again after Redis has lost it, and a key of ours that holds somebody
else's data is set aside, because every script would stumble over it.

Every controller remembers, whether it leads or not, so that the loss of Redis and of the leader at
once loses nothing. No fence guards this: a declaration is an operator's word, guarded by its
generation, and foreign data are looked at and moved in one act, whoever leads.
"""

from typing import Final

import structlog

from shared.clock import Clock
from shared.errors import RegistryError
from shared.lifecycle import every
from shared.models.event import Event, EventLevel
from shared.registry import Registry
from shared.registry.connection import check_schema
from shared.registry.memory import Memory

REMEMBER_S: Final = 1.0

_log = structlog.get_logger(__name__)


async def remember(registry: Registry, clock: Clock, owner: str) -> None:
    """Read what is declared each second, and declare again what was lost, for ever."""
    memory = Memory(registry.fleet)

    async def tell(kind: str, subject: str, message: str) -> None:
        await registry.fleet.emit(
            Event(
                kind=kind,
                subject=subject,
                message=message,
                level=EventLevel.WARNING,
                source=f"controller/{owner}",
                at_ms=clock.now_ms(),
            )
        )

    async def refresh() -> None:
        try:
            await check_schema(registry.connection, registry.keys)  # writes it if it was lost
            for key in await registry.fleet.quarantine():
                aside = registry.keys.fleet.aside(key)
                await tell("KeySetAside", f"key/{key}", f"it held foreign data: now in {aside}")
            for model in await memory.refresh():
                message = "Redis had lost what was declared: declared again from memory"
                await tell("DeploymentRestored", f"deployment/{model}", message)
        except RegistryError as error:
            _log.debug("declarations_not_read", error=str(error))

    await every(lambda: REMEMBER_S, refresh)
