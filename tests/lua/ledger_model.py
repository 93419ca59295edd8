"""The ledger's promise in plain Python: reservations are the only state, all else is derived.

The Lua scripts change totals and scores step by step; this model sums the leases anew each time. It
follows the server where the server may choose (which of several equal replicas, which reservations
a partial reap drops), and checks that the choice was allowed.
"""

from dataclasses import dataclass, field

FULL = 4_000_000_000_000_000
MAX_COST = 1_000_000_000

NUMBERS = {
    "nan": None,
    "-nan": None,
    "": None,
    "abc": None,
    "1e": None,
    "{}": None,
    "inf": MAX_COST,
    "-inf": 0,
    "1e308": MAX_COST,
    "-1e308": 0,
    "-5": 0,
    "-0": 0,
    "0": 0,
    "3.99": 3,
    "1e3": 1000,
    "0x10": 16,
    " 12 ": 12,
    "99999999999999999999": MAX_COST,
}
"""What a client may send for a number → what it means, None for what is no number."""


def cost_of(text: str) -> int:
    """Read a cost: [0, 1e9], and 1 for what is no number."""
    if text in NUMBERS:
        value = NUMBERS[text]
        return 1 if value is None else value
    return min(MAX_COST, max(0, int(text)))


@dataclass
class Known:
    """What the ledger knows of a replica: inverse throughput, cap, penalty."""

    inverse: int = 1000
    cap: int = 256
    penalty: int = 0
    ready: bool = True


@dataclass
class LedgerModel:
    """All reservations of one model."""

    replicas: dict[str, Known] = field(default_factory=dict[str, Known])
    leases: dict[str, dict[str, tuple[str, int]]] = field(
        default_factory=dict[str, dict[str, tuple[str, int]]]
    )
    max_requests: int = 100_000
    affinity_absolute: int = 0
    affinity_relative: float = 1.0

    def requests(self) -> dict[str, int]:
        """Count reservations per replica."""
        counts: dict[str, int] = {}
        for held in self.leases.values():
            for rid, _ in held.values():
                counts[rid] = counts.get(rid, 0) + 1
        return counts

    def costs(self) -> dict[str, int]:
        """Sum costs per replica."""
        sums: dict[str, int] = {}
        for held in self.leases.values():
            for rid, cost in held.values():
                sums[rid] = sums.get(rid, 0) + cost
        return sums

    def scores(self) -> dict[str, int]:
        """Give the score of every READY replica."""
        requests, costs = self.requests(), self.costs()
        scores: dict[str, int] = {}
        for rid, known in self.replicas.items():
            if known.ready:
                load = min(costs.get(rid, 0) * known.inverse + known.penalty, FULL - 1)
                scores[rid] = load + (FULL if requests.get(rid, 0) >= known.cap else 0)
        return scores

    def allowed(self, cost: int, affinity: dict[str, int], exclude: tuple[str, ...]) -> set[str]:
        """Give every answer that a reserve may get now."""
        if sum(self.requests().values()) >= self.max_requests:
            return {"!BUSY"}
        scores = {rid: s for rid, s in self.scores().items() if rid not in exclude}
        if not scores:
            return {"!NONE"}
        lowest = min(scores.values())
        if lowest >= FULL:
            return {"!BUSY"}
        idlest = {rid for rid, score in scores.items() if score == lowest}
        done = {
            rid: scores[rid] + there * self.replicas[rid].inverse
            for rid, there in affinity.items()
            if rid in scores and scores[rid] < FULL
        }
        soonest = {rid for rid, when in done.items() if when == min(done.values())}
        bound = max(lowest + self.affinity_absolute * 1000, lowest * self.affinity_relative)
        # Of several with the lowest score, the server may hold any against the candidates.
        allowed: set[str] = set()
        for rid in idlest:
            elsewhere = bound + cost * self.replicas[rid].inverse
            wins = bool(done) and min(done.values()) <= elsewhere
            allowed |= soonest if wins else idlest
        return allowed

    def reserve(
        self,
        proxy: str,
        request: str,
        cost: int,
        affinity: dict[str, int],
        exclude: tuple[str, ...],
        answer: str,
    ) -> None:
        """Check an answer to a reserve, and follow it."""
        held = self.leases.setdefault(proxy, {})
        if request in held and held[request][0] not in exclude:
            assert answer == held[request][0], f"{request} was on {held[request][0]}, not {answer}"
            return
        held.pop(request, None)
        allowed = self.allowed(cost, affinity, exclude)
        assert answer in allowed, f"{request} got {answer}, allowed: {sorted(allowed)}"
        if not answer.startswith("!"):
            held[request] = (answer, affinity.get(answer, cost))

    def release(self, proxy: str, request: str) -> int:
        """Release; tell whether there was something."""
        return int(self.leases.setdefault(proxy, {}).pop(request, None) is not None)

    def adopt(self, proxy: str, request: str, rid: str, cost: int) -> int:
        """Adopt; tell whether anything changed."""
        held = self.leases.setdefault(proxy, {})
        changed = held.get(request) != (rid, cost)
        held[request] = (rid, cost)
        return int(changed)

    def reap(self, proxy: str, left: set[str], dropped: int, limit: int) -> None:
        """Check what a reap left, and follow it."""
        held = self.leases.setdefault(proxy, {})
        assert left <= set(held)
        assert dropped == min(limit, len(held)) == len(held) - len(left)
        self.leases[proxy] = {request: held[request] for request in left}
