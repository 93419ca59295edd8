"""The live requests of one model in this proxy: the truth that the ledger is compared with.

A holding is a reservation that this proxy believes in: made by the ledger, or chosen locally while
the ledger was away. Whatever Redis says or forgets, the holdings here say what is really running.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from shared.models.routing import Lease


class Holding:
    """One reservation of one live request."""

    __slots__ = ("cost_tokens", "rid", "since_s", "streamed")

    def __init__(self, rid: str, cost_tokens: int, since_s: float) -> None:
        self.rid = rid
        self.cost_tokens = cost_tokens
        self.since_s = since_s
        self.streamed = False


class Repair(NamedTuple):
    """What makes the ledger equal to the live requests."""

    adopt: list[tuple[str, Holding]]
    release: list[str]


class LiveRequests:
    """Holdings by ledger id, and how many of them each replica carries."""

    __slots__ = ("_by_id", "own")

    def __init__(self) -> None:
        self._by_id: dict[str, Holding] = {}
        self.own: dict[str, int] = {}
        """Replica → requests of this proxy on it."""

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, request: str) -> Holding | None:
        """Give the holding of a request, if it holds one."""
        return self._by_id.get(request)

    def items(self) -> Iterable[tuple[str, Holding]]:
        """Give all holdings."""
        return self._by_id.items()

    def add(self, request: str, holding: Holding) -> None:
        """Begin a holding."""
        self._by_id[request] = holding
        self.own[holding.rid] = self.own.get(holding.rid, 0) + 1

    def remove(self, request: str) -> Holding | None:
        """End a holding; None if there was none."""
        holding = self._by_id.pop(request, None)
        if holding is not None:
            left = self.own[holding.rid] - 1
            if left:
                self.own[holding.rid] = left
            else:
                del self.own[holding.rid]
        return holding

    def compare(self, leases: Mapping[str, Lease], unsettled: Iterable[str]) -> Repair:
        """Say what the ledger lacks and what it has too much.

        Requests with an operation under way (`unsettled`) are left alone: their truth is in
        flight, and the next comparison sees it.
        """
        skip = set(unsettled)
        adopt: list[tuple[str, Holding]] = []
        for request, holding in self._by_id.items():
            if request in skip:
                continue
            lease = leases.get(request)
            if (
                lease is None
                or lease.rid != holding.rid
                or lease.cost_tokens != holding.cost_tokens
            ):
                adopt.append((request, holding))
        release = [
            request for request in leases if request not in self._by_id and request not in skip
        ]
        return Repair(adopt, release)
