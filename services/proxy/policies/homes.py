"""Rendezvous hashing: the replicas where a digest is at home, the same for every proxy.

Digests fall into a fixed number of slots; a slot's homes are the READY replicas with the highest
weight, a hash of slot and replica. So proxies agree without a word between them, as far as their
tables agree; a replica that leaves changes the homes of its own slots only, and one that comes
takes its share of slots from all others and changes nothing else.

A slot's homes are worked out when somebody first asks for them, in time linear in the replicas, and
kept. A replica that comes is held against the homes that are kept, a replica that leaves drops
those that it was among: no request pays for a change of slots other than its own.
"""

from collections.abc import Mapping, Sequence
from math import log
from typing import Final
from zlib import crc32

SLOTS: Final = 4096
HOMES: Final = 2
"""Homes per slot: where the first has no room, the second has the rest of the load."""
_SPREAD: Final = 0x9E3779B1
_RANGE: Final = 1 << 32
_MASK: Final = _RANGE - 1


class _Slot:
    """The homes of one slot, best first, and how many arrivals they have seen."""

    __slots__ = ("arrivals", "homes", "weights")

    def __init__(self, arrivals: int) -> None:
        self.homes: list[str] = []
        self.weights: list[float] = []
        self.arrivals = arrivals

    def enter(self, rid: str, weight: float) -> None:
        """Let a replica take the place that its weight gives it."""
        weights = self.weights
        at = len(weights)
        while at and weight > weights[at - 1]:
            at -= 1
        self.homes.insert(at, rid)
        weights.insert(at, weight)
        del self.homes[HOMES:], weights[HOMES:]


class Homes:
    """The homes of every slot among the replicas of one model."""

    def __init__(self) -> None:
        self._capacities: dict[str, float] = {}
        self._groups: dict[float, dict[str, int]] = {}
        """Capacity → replica → its number in hashes."""
        self._arrivals: list[str] = []
        """Replicas in the order in which they came; those that have left stay named."""
        self._slots: dict[int, _Slot] = {}

    def update(self, capacities: Mapping[str, float]) -> None:
        """Take over which replicas are READY, and their relative throughput."""
        known = self._capacities
        gone = {rid for rid, capacity in known.items() if capacities.get(rid) != capacity}
        new = [rid for rid, capacity in capacities.items() if known.get(rid) != capacity]
        if not gone and not new:
            return
        if gone:
            self._slots = {
                number: slot for number, slot in self._slots.items() if gone.isdisjoint(slot.homes)
            }
        self._capacities = dict(capacities)
        self._groups = {}
        for rid, capacity in capacities.items():
            self._groups.setdefault(capacity, {})[rid] = crc32(rid.encode())
        self._arrivals += new
        if len(self._arrivals) > 2 * len(capacities) + SLOTS:
            self._arrivals = []
            self._slots = {}

    def of(self, digest: int) -> Sequence[str]:
        """Name the homes of a digest, best first; none where no replica is READY."""
        number = ((digest * _SPREAD) & _MASK) * SLOTS // _RANGE
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = self._ranked(number)
        elif slot.arrivals < len(self._arrivals):
            self._catch_up(number, slot)
        return slot.homes

    def _ranked(self, number: int) -> _Slot:
        """Work out a slot: of each capacity, only those with the highest draws can be its homes."""
        slot = _Slot(len(self._arrivals))
        factor = _factor(number)
        for capacity, group in self._groups.items():
            draws = [base * factor & _MASK for base in group.values()]
            rids = list(group)
            for _ in range(min(HOMES, len(draws))):
                best = max(draws)
                at = draws.index(best)
                slot.enter(rids[at], _weight(best, capacity))
                draws[at] = -1
        return slot

    def _catch_up(self, number: int, slot: _Slot) -> None:
        """Hold the replicas that came since against the homes that there are."""
        factor = _factor(number)
        for rid in self._arrivals[slot.arrivals :]:
            capacity = self._capacities.get(rid)
            if capacity is not None and rid not in slot.homes:
                draw = self._groups[capacity][rid] * factor & _MASK
                slot.enter(rid, _weight(draw, capacity))
        slot.arrivals = len(self._arrivals)


def _factor(number: int) -> int:
    """Give a slot the odd number by which it draws: other slots, other draws."""
    return crc32(number.to_bytes(4, "little")) | 1


def _weight(draw: int, capacity: float) -> float:
    """Weigh a draw, so that a replica wins a share of slots in proportion to its capacity."""
    return -max(capacity, 1e-6) / log((draw + 0.5) / _RANGE)
