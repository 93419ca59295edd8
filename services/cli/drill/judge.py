"""The judge: what was seen against the budget. Pure, so that it can be tested as a rule is.

What was not seen at all has failed: silence proves nothing.
"""

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import Final

import msgspec

from services.cli.drill.records import (
    Budget,
    Check,
    Outcome,
    Request,
    Sample,
    Second,
    Seen,
    Struck,
    Traffic,
    Verdict,
)
from services.cli.drill.signs import Sign

NOTICED_S: Final = 1.0
"""A wait that a client notices, at least."""
DETAILS: Final = 8


class Recovery(StrEnum):
    """What a drill waits for after its fault; the text completes "until …"."""

    OUT = "out of routing"
    """No struck replica gets new requests."""
    LEADER = "another controller leads"
    BACK = "its successor runs"
    """The struck member beats, with another pid."""
    REAPED = "its reservations are given back"
    """The ledger knows the struck proxy no more."""
    LEDGER = "every proxy uses the ledger again"
    STREAMS = "no client waits any more"
    """The last wait that a client noticed is over."""
    ROLLED = "every replica is of the new revision"


def recovered_s(
    how: Recovery,
    struck: Struck,
    samples: Sequence[Sample],
    *,
    from_s: float,
) -> float | None:
    """Tell when the mesh had recovered, by the first sample since `from_s` that shows it.

    STREAMS is not seen in samples of the mesh: see `waits_over_s`.
    """
    for sample in samples:
        if sample.at_s >= from_s and _shows(how, struck, sample):
            return sample.at_s
    return None


def _shows(how: Recovery, struck: Struck, sample: Sample) -> bool:
    match how:
        case Recovery.OUT:
            return sample.ready is not None and not sample.ready & struck.replicas
        case Recovery.LEADER:
            return sample.leader is not None and sample.leader not in {"", struck.leader}
        case Recovery.BACK:
            return sample.members is not None and sample.members.get(
                struck.member, struck.pid
            ) not in {0, struck.pid}
        case Recovery.REAPED:
            name = struck.member.partition(":")[2]
            return sample.holders is not None and name not in sample.holders
        case Recovery.LEDGER:
            return sample.redis and sample.away is not None and not sample.away
        case Recovery.ROLLED | Recovery.STREAMS:
            rolled = sample.whole is True and sample.revisions == frozenset({struck.revision})
            return how is Recovery.ROLLED and rolled


def answers_s(samples: Sequence[Sample], *, fault_s: float) -> float | None:
    """Tell when Redis, or another one, answered again; None if no change was seen, or no answer."""
    known: set[str] = set()
    away = False
    found: float | None = None
    for sample in samples:
        if sample.at_s < fault_s:
            known |= {sample.redis_id} if sample.redis_id else set()
            continue
        other = bool(known and sample.redis_id) and sample.redis_id not in known
        if not sample.redis:
            away, found = True, None
        elif (away or other) and found is None:
            found = sample.at_s
    return found


def waits_over_s(
    requests: Sequence[Request], *, fault_s: float, usual_s: float, until_s: float
) -> float:
    """Tell when the last wait that a client noticed was over; `fault_s` when nobody noticed.

    A wait counts if it ended after the fault and was three times as long as usual, and a second.
    One that had not ended at `until_s` counts as ended then.
    """
    noticed_s = max(NOTICED_S, 3 * usual_s)
    ends = [
        min(each.gap_ended_s, until_s)
        for each in requests
        if each.gap_s >= noticed_s and each.gap_ended_s > fault_s
    ]
    return max(ends, default=fault_s)


def flowing_s(seconds: Sequence[Second], *, fault_s: float) -> float | None:
    """Tell when watched traffic flowed at half its usual rate again, for two seconds in a row."""
    before = [each.tokens for each in seconds if each.at_s + 1 <= fault_s]
    if not before:
        return None
    half = sum(before) / len(before) / 2
    after = [each for each in seconds if each.at_s >= int(fault_s)]
    for number, each in enumerate(after[:-1]):
        if each.tokens >= half and after[number + 1].tokens >= half:
            return max(fault_s, float(each.at_s))
    return None


def whole_s(samples: Sequence[Sample], *, from_s: float) -> float | None:
    """Tell since when the mesh has been whole without a break; None if it is not at the end."""
    since: float | None = None
    for sample in samples:
        if sample.at_s < from_s or sample.whole is None:
            continue
        if not sample.whole:
            since = None
        elif since is None:
            since = sample.at_s
    return since


def traffic_of(
    requests: Sequence[Request],
    *,
    fault_s: float,
    struck_url: str = "",
    compared: bool,
) -> Traffic:
    """Sum up what was driven."""
    bad = [each for each in requests if each.outcome is not Outcome.OK]
    broken = [each for each in bad if each.begun]
    later = [each for each in requests if each.ended_s >= fault_s]
    return Traffic(
        driven=True,
        count=len(requests),
        ok=len(requests) - len(bad),
        failed=len(bad) - len(broken),
        broken=len(broken),
        own=sum(bool(struck_url) and each.proxy == struck_url for each in broken),
        resent=sum(each.tries > 1 for each in requests),
        outcomes=dict(Counter(each.outcome.value for each in requests)),
        details=tuple(
            f"{each.began_s:.1f} s, {each.proxy}: {each.outcome} after "
            f"{each.ended_s - each.began_s:.2f} s: {each.detail}"
            for each in bad[:DETAILS]
        ),
        ttft_before_ms=_ttft_ms([each for each in requests if each.ended_s < fault_s]),
        ttft_after_ms=_ttft_ms([each for each in later if each.began_s >= fault_s]),
        longest_gap_s=max((each.gap_s for each in later), default=0.0),
        compared=compared,
    )


def _ttft_ms(requests: Sequence[Request]) -> tuple[float, float] | None:
    values = sorted(
        (each.first_s - each.began_s) * 1000 for each in requests if each.first_s is not None
    )
    if not values:
        return None
    return values[len(values) // 2], values[min(len(values) - 1, len(values) * 99 // 100)]


def judge(how: Recovery, sign: Sign, budget: Budget, seen: Seen) -> Verdict:
    """Hold what was seen against the budget; first of all, that there was a fault."""
    fault = Check(
        name="fault",
        expected=f"the fault is seen: {sign}",
        seen=seen.sign or "not while it was watched",
        passed=bool(seen.sign),
    )
    checks = [fault, *_traffic_checks(budget, seen), *_mesh_checks(how, budget, seen)]
    return Verdict(passed=all(check.passed for check in checks), checks=tuple(checks))


def _traffic_checks(budget: Budget, seen: Seen) -> list[Check]:
    traffic = seen.traffic
    broken = traffic.broken - (traffic.own if budget.spare_own else 0)
    spared = f", and {traffic.own} of the struck proxy itself" if budget.spare_own else ""
    checks = [
        _count("traffic", 1, traffic.ok, "request answered well", at_least=True),
        _count("failed", budget.failed, traffic.failed, "requests failed"),
        Check(
            name="broken",
            expected=f"{_bound(budget.broken, at_least=False)} streams broken",
            seen=f"{broken}{spared}" + ("" if traffic.compared else "; texts not compared"),
            passed=broken <= budget.broken,
        ),
    ]
    if traffic.driven and budget.resent is not None:
        checks.append(
            _count("resent", budget.resent, traffic.resent, "requests sent again by clients")
        )
    return checks


def _mesh_checks(how: Recovery, budget: Budget, seen: Seen) -> list[Check]:
    base_s = starts_s(how, seen.fault_s, seen.heal_s, seen.answers_s)
    checks = [
        _time("recover", how.value, budget.recover_s, seen.recovered_s, base_s),
        _time("whole", "the mesh is whole", budget.whole_s, seen.whole_s, seen.heal_s),
        _exact(budget, seen),
        _count("drift", budget.drift, seen.drift, "findings in the last audit"),
        _count("left", 0, seen.left, "reservations left after the load"),
    ]
    if seen.trespass:
        checks.append(Check(name="trespass", expected="never", seen=seen.trespass, passed=False))
    return checks


def starts_s(how: Recovery, fault_s: float, heal_s: float, answers: float | None) -> float:
    """Tell from when recovery counts: of the ledger, from when Redis answers; else the fault."""
    if how is not Recovery.LEDGER:
        return fault_s
    return heal_s if answers is None else answers


def trespass(struck: Struck, samples: Sequence[Sample]) -> str:
    """Name what must never be: a struck leader that leads again after another one led."""
    if not struck.leader:
        return ""
    followed = False
    for sample in samples:
        if followed and sample.leader == struck.leader:
            return f"the struck controller {struck.leader} led again"
        followed = followed or sample.leader not in {None, "", struck.leader}
    return ""


def drift_base_s(seen: Seen) -> float:
    """Tell from when the ledger must become exact: once the fault is over and Redis answers."""
    return max(seen.heal_s, seen.answers_s or 0.0)


def _exact(budget: Budget, seen: Seen) -> Check:
    """Judge when an audit was clean; where none was, say what was wrong."""
    check = _time("exact", "an audit is clean", budget.drift_s, seen.exact_s, drift_base_s(seen))
    if seen.exact_s is not None or not seen.unclean:
        return check
    return msgspec.structs.replace(check, seen=f"{check.seen}: {seen.unclean}")


def _count(name: str, bound: int, seen: int, what: str, *, at_least: bool = False) -> Check:
    return Check(
        name=name,
        expected=f"{_bound(bound, at_least=at_least)} {what}",
        seen=f"{seen}",
        passed=seen >= bound if at_least else seen <= bound,
    )


def _bound(bound: int, *, at_least: bool) -> str:
    if at_least:
        return f"at least {bound}"
    return f"at most {bound}" if bound else "no"


def _time(name: str, what: str, bound_s: float, at_s: float | None, base_s: float) -> Check:
    expected = f"{what} within {bound_s:g} s"
    if at_s is None:
        return Check(name=name, expected=expected, seen="not while it was watched", passed=False)
    took_s = max(0.0, at_s - base_s)
    return Check(name=name, expected=expected, seen=f"{took_s:.2f} s", passed=took_s <= bound_s)
