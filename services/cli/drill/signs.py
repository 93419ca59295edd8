"""The signs of a fault: by what it is seen that it struck at all. Pure.

A mesh that shrugs off a fault looks like one that nothing happened to. So each drill names a sign
that only its fault gives, and what was not seen to strike has not been rehearsed.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final

import msgspec

from services.cli.drill.records import Request, Sample, Struck

LOOKS_S: Final = 1.0
"""What a look may add: one that began while Redis was silent may end when it answers."""


class Sign(StrEnum):
    """By what a fault is seen; the text completes "the fault is seen: …"."""

    OUT = "its replicas leave routing"
    GONE = "the process is gone, or another one is in its place"
    FOLLOWED = "another controller leads"
    SILENT = "Redis answers nobody"
    REPLACED = "another Redis answers"
    EMPTIED = "another Redis answers, and what the old one held is gone"
    DISCONNECTED = "connections are cut"
    APART = "the proxy does without Redis"
    LEFT = "requests leave the replica, or wait"
    ROLLED = "every replica is of the new revision"


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """All that may show a fault."""

    struck: Struck
    samples: Sequence[Sample]
    fault_s: float
    heal_s: float
    fault_ms: int = 0
    """When it struck, by Redis' clock."""
    requests: Sequence[Request] = ()
    told: str = ""
    """What the injector itself saw of it."""


def seen(sign: Sign, evidence: Evidence) -> str:
    """Say in words what showed the fault; empty if nothing did."""
    match sign:
        case Sign.DISCONNECTED:
            return evidence.told
        case Sign.SILENT:
            return _silence(evidence)
        case Sign.LEFT:
            return _left(evidence)
        case Sign.REPLACED:
            return _replaced(evidence)
        case Sign.EMPTIED:
            return _replaced(evidence) and _after(evidence, _emptied(evidence))
        case _:
            return _after(evidence, (s for s in _since(evidence) if _shows(sign, evidence, s)))


def _shows(sign: Sign, evidence: Evidence, sample: Sample) -> bool:
    struck = evidence.struck
    match sign:
        case Sign.OUT:
            out = sample.ready is not None and not sample.ready & struck.replicas
            return bool(struck.replicas) and out
        case Sign.GONE:
            return sample.members is not None and sample.members.get(struck.member) != struck.pid
        case Sign.FOLLOWED:
            return sample.leader is not None and sample.leader not in {"", struck.leader}
        case Sign.APART:
            return sample.away is not None and struck.member.partition(":")[2] in sample.away
        case _:
            return sign is Sign.ROLLED and sample.revisions == frozenset({struck.revision})


def _since(evidence: Evidence) -> list[Sample]:
    return [sample for sample in evidence.samples if sample.at_s >= evidence.fault_s]


def _before(evidence: Evidence) -> list[Sample]:
    return [sample for sample in evidence.samples if sample.at_s < evidence.fault_s]


def _after(evidence: Evidence, showing: Iterable[Sample]) -> str:
    for sample in showing:
        return f"after {sample.at_s - evidence.fault_s:.2f} s"
    return ""


def _silence(evidence: Evidence) -> str:
    """Find looks in a row that Redis left unanswered for about half the fault's time."""
    needed_s = (evidence.heal_s - evidence.fault_s) / 2 - LOOKS_S
    longest: list[Sample] = []
    row: list[Sample] = []
    for sample in _since(evidence):
        row = [] if sample.redis else [*row, sample]
        longest = max(longest, row, key=len)
    if len(longest) < 2:
        return ""
    lasted_s = max(s.at_s for s in longest) - min(s.at_s for s in longest)
    return f"{len(longest)} looks in a row" if lasted_s >= needed_s else ""


def _replaced(evidence: Evidence) -> str:
    known = {s.redis_id for s in _before(evidence) if s.redis_id}
    if not known:  # a Redis that does not tell who it is: that it was away must do
        return _after(evidence, (s for s in _since(evidence) if not s.redis))
    since = _since(evidence)
    return _after(evidence, (s for s in since if s.redis_id and s.redis_id not in known))


def _emptied(evidence: Evidence) -> Iterable[Sample]:
    if not any(sample.oldest_ms for sample in _before(evidence)):
        return  # it held nothing that could be missed
    for sample in _since(evidence):
        oldest_ms = sample.oldest_ms
        if oldest_ms is not None and (oldest_ms == 0 or oldest_ms >= evidence.fault_ms):
            yield sample


def _left(evidence: Evidence) -> str:
    """Find requests that went elsewhere, by the proxies' count, or that waited for the replica."""
    moved = [s.moved for s in _before(evidence) if s.moved is not None]
    now = [s.moved for s in _since(evidence) if s.moved is not None]
    if moved and now and max(now) > moved[-1]:
        return f"{max(now) - moved[-1]:.0f} went elsewhere"
    half_s = (evidence.heal_s - evidence.fault_s) / 2
    waits_s = [
        each.gap_s
        for each in evidence.requests
        if each.gap_ended_s > evidence.fault_s and each.gap_s >= max(half_s, LOOKS_S)
    ]
    return f"{len(waits_s)} waited up to {max(waits_s):.2f} s" if waits_s else ""
