"""Drops what dead proxies held, for every model, also where no proxy is left to do it.

Any proxy may do this too, so no fence guards it: the scripts make it safe to do it twice and
impossible to do it to a proxy that beats.
"""

from collections.abc import Iterable

from services.controller.act import Actor
from services.controller.draft import tell
from shared.models.event import EventLevel
from shared.registry.ledger import Ledger


async def reap_dead_proxies(ledger: Ledger, actor: Actor, models: Iterable[str]) -> int:
    """Look for silent proxies of `models`, drop their reservations and return how many.

    Raises LeadershipLostError as soon as the reign is over, and the registry's errors.
    """
    total = 0
    for model in models:
        actor.check()
        for proxy in await ledger.suspects(model):
            dropped = 0
            while True:
                actor.check()
                reply = await ledger.reap(model, proxy)
                dropped += reply.dropped
                if reply.alive or reply.left == 0 or reply.dropped == 0:
                    break
            if not reply.alive:
                message = f"silent: its {dropped} reservations of {model} were dropped"
                await actor.tell(tell("ProxyReaped", f"proxy/{proxy}", message, EventLevel.WARNING))
            total += dropped
    return total
