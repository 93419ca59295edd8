"""Drops what dead proxies held, for every model, also where no proxy is left to do it.

Any proxy may do this too; the scripts make it safe to do it twice and impossible to do it to a
proxy that beats.
"""

from collections.abc import Iterable

from services.controller.draft import tell
from services.controller.events import EventLog
from shared.models.event import EventLevel
from shared.registry.ledger import Ledger


async def reap_dead_proxies(ledger: Ledger, events: EventLog, models: Iterable[str]) -> int:
    """Look for silent proxies of `models`, drop their reservations and return how many."""
    total = 0
    for model in models:
        for proxy in await ledger.suspects(model):
            dropped = 0
            while True:
                reply = await ledger.reap(model, proxy)
                dropped += reply.dropped
                if reply.alive or reply.left == 0 or reply.dropped == 0:
                    break
            if not reply.alive:
                message = f"silent: its {dropped} reservations of {model} were dropped"
                await events.emit(
                    tell("ProxyReaped", f"proxy/{proxy}", message, EventLevel.WARNING)
                )
            total += dropped
    return total
