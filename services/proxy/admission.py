"""Who may enter: pure rules on numbers, before anything is reserved.

Today: the model's own cap on requests that wait. The cap on requests in flight is the ledger's
(it is the only one who sees all proxies). Rules by tenant will stand beside these.
"""

from shared.models.routing import ModelSpec


def may_wait(waiting: int, limit: int) -> bool:
    """Tell whether one more request may wait in this proxy."""
    return waiting < limit


def hold_s(spec: ModelSpec, hold_timeout_s: float) -> float:
    """Return how long a request waits for a replica to become ready."""
    return min(spec.request_timeout_s, hold_timeout_s)


def retry_after_s(waiting: int, finished_per_s: float) -> int:
    """Return when to come back: the time this proxy needs for those who wait, 1 to 30 s."""
    if finished_per_s <= 0:
        return 5
    return max(1, min(30, round((waiting + 1) / finished_per_s)))
