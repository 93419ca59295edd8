"""Leadership: who of the controllers acts, and until when.

The lease in Redis ends by itself. How long this process may act is counted on its own monotonic
clock, from before the request for the lease left, and ends well before the lease does; so a slow
reply shortens a reign and never lengthens it. A process that is paused wakes up after its time and
stops by itself; should a write of it still arrive late, the fence refuses it.
"""

from typing import Final, Protocol

import msgspec
import structlog

from shared.clock import Clock
from shared.errors import RegistryError
from shared.registry.leadership import Following, Leading

ACTING_SHARE: Final = 0.7
"""Part of the lease's time in which a leader acts: of 5 s, the first 3.5 s."""

GRACE_S: Final = 0.02
"""Asking this long after a lease's end finds it gone, also where the clocks' ticks differ."""

_log = structlog.get_logger(__name__)


class Lease(Protocol):
    """What a campaign needs of the registry."""

    async def try_lead(self, owner: str, ttl_ms: int) -> Leading | Following:
        """Take the lease if it is free, renew it if it is ours."""
        ...

    async def resign(self, owner: str) -> None:
        """Give the lease back if it is ours."""
        ...


class Reign(msgspec.Struct, frozen=True, kw_only=True):
    """One uninterrupted time of leadership."""

    epoch: int
    since_s: float
    """Monotonic time of its beginning, here."""


class Leader:
    """One controller's candidacy. `campaign` is called about once a second, for ever.

    A follower asks again just when the lease that it saw would end, so that a leader who vanished
    is followed at the end of its lease and not a whole interval later.
    """

    def __init__(self, lease: Lease, clock: Clock, owner: str, *, ttl_ms: int) -> None:
        self.owner = owner
        self._lease = lease
        self._clock = clock
        self._ttl_ms = ttl_ms
        self._reign: Reign | None = None
        self._acts_until_s = 0.0
        self._fenced = False
        self._free_at_s: float | None = None
        self.problem: str | None = "has not reached Redis yet"
        """Why the last campaign failed; None after one that Redis answered."""

    def reign(self) -> Reign | None:
        """Give the reign in which this process may act now, if it may."""
        if self._reign is None or self._clock.monotonic_s() >= self._acts_until_s:
            return None
        return self._reign

    def may_act(self, reign: Reign) -> bool:
        """Tell whether `reign` still lasts; asked before every write."""
        return self.reign() == reign

    async def campaign(self) -> None:
        """Ask for the lease once. Redis being away is an answer too: the reign runs out."""
        sent_s = self._clock.monotonic_s()
        try:
            if self._fenced:
                # We still hold the lease, but another epoch has been seen: ask for a higher one.
                await self._lease.resign(self.owner)
                self._fenced = False
            reply = await self._lease.try_lead(self.owner, self._ttl_ms)
        except RegistryError as error:
            if self.problem is None:
                _log.warning("campaign_failed", reason=str(error))
            self.problem = str(error)
            return
        self.problem = None
        self._free_at_s = None
        if isinstance(reply, Following):
            self._free_at_s = self._clock.monotonic_s() + reply.ttl_left_ms / 1000
            self._end("another controller leads", owner=reply.owner)
            return
        lapsed = self.reign() is None
        if self._reign is None or lapsed or self._reign.epoch != reply.epoch:
            self._reign = Reign(epoch=reply.epoch, since_s=self._clock.monotonic_s())
            _log.info("elected", epoch=reply.epoch)
        self._acts_until_s = sent_s + ACTING_SHARE * self._ttl_ms / 1000

    def pause_s(self, usual_s: float) -> float:
        """Tell how long to wait before the next campaign: not beyond the end of another's lease."""
        if self._free_at_s is None:
            return usual_s
        left_s = self._free_at_s + GRACE_S - self._clock.monotonic_s()
        return min(usual_s, max(left_s, GRACE_S))

    def fenced_off(self) -> None:
        """Stop acting at once: a write of ours was refused because of a higher epoch."""
        self._fenced = True
        self._end("a write was fenced off")

    async def resign(self) -> None:
        """Stop acting and give the lease back, so that a standby need not wait for its end."""
        self._end("resigned")
        try:
            await self._lease.resign(self.owner)
        except RegistryError as error:
            _log.warning("resign_failed", reason=str(error))

    def _end(self, reason: str, **context: str) -> None:
        if self._reign is not None:
            _log.info("leadership_ended", epoch=self._reign.epoch, reason=reason, **context)
        self._reign = None
        self._acts_until_s = 0.0
