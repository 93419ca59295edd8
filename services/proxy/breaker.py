"""Two breakers: one keeps a failing replica out of the way, one keeps a slow Redis out of it.

Both are plain state machines; time is an argument.
"""

from typing import Final

REPLICA_FAILURES: Final = 3
EJECTION_S: Final = 5.0
MAX_EJECTION_S: Final = 30.0
REDIS_MISSES: Final = 5
REDIS_ERRORS: Final = 3


class ReplicaBreaker:
    """Ejects one replica locally after consecutive connection-level failures.

    Any answer closes it at once; each further failure while it is open doubles the ejection up
    to 30 s. Client errors are answers: they never count against a replica.
    """

    __slots__ = ("_ejected_until_s", "_ejection_s", "failures")

    def __init__(self) -> None:
        self.failures = 0
        """In a row."""
        self._ejection_s = EJECTION_S
        self._ejected_until_s = 0.0

    def answered(self) -> None:
        """Note that the replica answered, whatever it said."""
        if self.failures:
            self.failures = 0
            self._ejection_s = EJECTION_S
            self._ejected_until_s = 0.0

    def failed(self, now_s: float) -> bool:
        """Note a connection-level failure; return whether this one ejected the replica."""
        self.failures += 1
        if self.failures < REPLICA_FAILURES or now_s < self._ejected_until_s:
            return False
        self._ejected_until_s = now_s + self._ejection_s
        self._ejection_s = min(self._ejection_s * 2, MAX_EJECTION_S)
        return True

    def ejected(self, now_s: float) -> bool:
        """Tell whether the replica is to be avoided now."""
        return now_s < self._ejected_until_s


class RedisBreaker:
    """Tells whether the ledger may be asked.

    Opens after five missed deadlines in a row or three errors; a slow Redis hurts more than a dead
    one. Closes only when a beat came back faster than the deadline.
    """

    __slots__ = ("_errors", "_misses", "_opened_s", "open")

    def __init__(self) -> None:
        self._misses = 0
        self._errors = 0
        self._opened_s = 0.0
        self.open = False
        """True while the ledger must not be asked."""

    def away_s(self, now_s: float) -> float:
        """Seconds since it opened; 0 while closed."""
        return now_s - self._opened_s if self.open else 0.0

    def answered(self) -> None:
        """Note a batch that was answered in time."""
        self._misses = 0
        self._errors = 0

    def missed(self, now_s: float) -> bool:
        """Note a missed deadline; return whether this one opened the breaker."""
        self._misses += 1
        return self._trip(now_s, self._misses >= REDIS_MISSES)

    def errored(self, now_s: float) -> bool:
        """Note an error; return whether this one opened the breaker."""
        self._errors += 1
        return self._trip(now_s, self._errors >= REDIS_ERRORS)

    def fast_beat(self) -> bool:
        """Note a beat answered within the deadline; return whether it closed the breaker."""
        was_open, self.open = self.open, False
        self.answered()
        return was_open

    def _trip(self, now_s: float, due: bool) -> bool:  # noqa: FBT001 - private, one caller above
        if not due or self.open:
            return False
        self.open = True
        self._opened_s = now_s
        return True
