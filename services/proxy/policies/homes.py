"""Rendezvous hashing: the replicas where a digest is at home, the same for every proxy.

Digests fall into a fixed number of slots; a slot's homes are the READY replicas with the highest
weight, a hash of slot and replica. So proxies agree without a word between them, as far as their
tables agree; a replica that leaves changes the homes of its own slots only, and one that comes
takes its share of slots from all others and changes nothing else.

A slot's homes are worked out when somebody first asks for them, in time linear in the replicas, and
kept. A replica that comes is held against the homes that are kept, a replica that leaves drops
those that it was among: no request pays for a change of slots other than its own.
"""

from collections.abc import Collection, Mapping
from math import log
from typing import Final
from zlib import crc32

SLOTS: Final = 4096
HOMES: Final = 2
"""Homes per slot: where the first has no room, the second has the rest of the load."""
_SPREAD: Final = 0x9E3779B1
_RANGE: Final = 1 << 32


class _Slot:
    """The homes of one slot, best first, and how many arrivals they have seen."""

    __slots__ = ("arrivals", "homes", "weights")

    def __init__(self, homes: list[str], weights: list[float], arrivals: int) -> None:
        self.homes = homes
        self.weights = weights
        self.arrivals = arrivals


class Homes:
    """The homes of every slot among the replicas of one model."""

    def __init__(self) -> None:
        self._capacities: dict[str, float] = {}
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
        self._arrivals += new
        if len(self._arrivals) > 2 * len(capacities) + SLOTS:
            self._arrivals = []
            self._slots = {}

    def of(self, digest: int) -> Collection[str]:
        """Name the homes of a digest, best first; none where no replica is READY."""
        number = ((digest * _SPREAD) & (_RANGE - 1)) * SLOTS // _RANGE
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = _Slot([], [], len(self._arrivals))
            for rid, capacity in self._capacities.items():
                _enter(slot, number, rid, capacity)
        elif slot.arrivals < len(self._arrivals):
            for rid in self._arrivals[slot.arrivals :]:
                capacity = self._capacities.get(rid)
                if capacity is not None and rid not in slot.homes:
                    _enter(slot, number, rid, capacity)
            slot.arrivals = len(self._arrivals)
        return slot.homes


def _enter(slot: _Slot, number: int, rid: str, capacity: float) -> None:
    """Let a replica take the place in a slot that its weight gives it."""
    weight = _weight(number, rid, capacity)
    weights, homes = slot.weights, slot.homes
    if len(homes) == HOMES and weight <= weights[-1]:
        return
    at = len(homes)
    while at and weight > weights[at - 1]:
        at -= 1
    homes.insert(at, rid)
    weights.insert(at, weight)
    del homes[HOMES:], weights[HOMES:]


def _weight(number: int, rid: str, capacity: float) -> float:
    """Weigh a replica for a slot: it wins a share of slots in proportion to its capacity."""
    mixed = (crc32(rid.encode(), number) * _SPREAD) & (_RANGE - 1)
    mixed ^= mixed >> 15
    return -max(capacity, 1e-6) / log((mixed + 0.5) / _RANGE)
