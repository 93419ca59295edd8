"""How patient the parent of workers is: with one that keeps crashing, and with one that drains."""

from typing import Final

FIRST_WAIT_S: Final = 0.2
LONGEST_WAIT_S: Final = 5.0
STEADY_S: Final = 10.0
"""A worker that ran for this long begins with the first wait again."""


class Backoff:
    """How long to wait before one worker is started again; doubles while it ends quickly."""

    def __init__(self) -> None:
        self._next_s = FIRST_WAIT_S

    def wait_s(self, ran_s: float) -> float:
        """Say how long to wait after it ran for `ran_s`."""
        if ran_s >= STEADY_S:
            self._next_s = FIRST_WAIT_S
        wait_s = self._next_s
        self._next_s = min(wait_s * 2, LONGEST_WAIT_S)
        return wait_s


def worker_admin_port(admin_port: int, slot: int) -> int:
    """Give a worker's admin port: those that follow the parent's, or any free one if that is 0."""
    return admin_port + 1 + slot if admin_port else 0
