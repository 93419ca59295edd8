"""Requests that wait for a replica of one model, first come, first served.

Each keeps the ticket it got when it first waited, so that trying again does not send it to the
end. Who waits for capacity is woken one by one; a change of the routing table wakes everybody.
"""

import heapq
from itertools import count
from typing import Protocol


class Waiter(Protocol):
    """A request that can wait."""

    @property
    def held(self) -> bool:
        """Tell whether it still waits."""
        ...

    def try_again(self) -> None:
        """Try to reserve now."""
        ...


class WaitingRoom:
    """The requests of one model that wait in this proxy."""

    __slots__ = ("_first_tickets", "_heap", "_tickets", "waiting")

    def __init__(self) -> None:
        self._heap: list[tuple[int, Waiter]] = []
        self._tickets = count(1)
        self._first_tickets = count(-(1 << 62))
        self.waiting = 0
        """How many wait now."""

    def ticket(self, *, first: bool = False) -> int:
        """Give the next place in the order; `first`: before all who have seen nothing yet."""
        return next(self._first_tickets if first else self._tickets)

    def enter(self, ticket: int, waiter: Waiter) -> None:
        """Wait, at the place of `ticket`."""
        self.waiting += 1
        heapq.heappush(self._heap, (ticket, waiter))

    def left(self) -> None:
        """Note that one waits no more; the waiter itself says so by `held`."""
        self.waiting -= 1
        if not self.waiting:
            self._heap.clear()  # only those that left: with their bodies they would stay for ever

    def wake(self, number: int) -> None:
        """Let the first `number` try again."""
        woken: list[Waiter] = []
        while self._heap and len(woken) < number:
            _, waiter = heapq.heappop(self._heap)
            if waiter.held:
                woken.append(waiter)
        for waiter in woken:
            waiter.try_again()

    def wake_all(self) -> None:
        """Let everybody try again, in order."""
        self.wake(len(self._heap))
