"""The judge of drills: each part of a budget, when it is kept and when it is missed."""

from typing import Any

import msgspec
import pytest

from services.cli.drill.catalogue import DRILLS, Facts, Fault, budget_of
from services.cli.drill.judge import (
    Recovery,
    answers_s,
    flowing_s,
    judge,
    recovered_s,
    starts_s,
    traffic_of,
    trespass,
    waits_over_s,
    whole_s,
)
from services.cli.drill.records import (
    Budget,
    Outcome,
    Request,
    Sample,
    Second,
    Seen,
    Struck,
    Traffic,
)
from services.cli.drill.signs import Sign

GOOD = Traffic(driven=True, count=9, ok=9, failed=0, broken=0, own=0, resent=0, outcomes={})
WELL = Seen(
    fault_s=4.0,
    heal_s=4.0,
    answers_s=None,
    recovered_s=4.5,
    whole_s=6.0,
    exact_s=5.0,
    drift=0,
    left=0,
    sign="after 0.10 s",
    traffic=GOOD,
)
BUDGET = Budget(recover_s=1.0, whole_s=5.0, drift_s=3.0)


def missed(
    how: Recovery = Recovery.OUT,
    budget: Budget = BUDGET,
    **seen: Any,  # noqa: ANN401 - fields of two structs
) -> set[str]:
    """Name the checks that a run misses which is well but for `seen`."""
    traffic = {name: seen.pop(name) for name in list(seen) if name in Traffic.__struct_fields__}
    changed = msgspec.structs.replace(
        WELL, traffic=msgspec.structs.replace(GOOD, **traffic), **seen
    )
    verdict = judge(how, Sign.OUT, budget, changed)
    names = {check.name for check in verdict.checks if not check.passed}
    assert verdict.passed == (not names)
    return names


@pytest.mark.parametrize(
    ("seen", "names"),
    [
        ({}, set[str]()),
        ({"ok": 0}, {"traffic"}),
        ({"failed": 1}, {"failed"}),
        ({"broken": 1}, {"broken"}),
        ({"broken": 1, "own": 1}, {"broken"}),
        ({"resent": 1}, {"resent"}),
        ({"resent": 1, "driven": False}, set[str]()),
        ({"recovered_s": 5.01}, {"recover"}),
        ({"recovered_s": 5.0}, set[str]()),
        ({"recovered_s": None}, {"recover"}),
        ({"whole_s": 9.1}, {"whole"}),
        ({"whole_s": None}, {"whole"}),
        ({"exact_s": 7.1}, {"exact"}),
        ({"exact_s": None}, {"exact"}),
        ({"drift": 1}, {"drift"}),
        ({"left": 1}, {"left"}),
        ({"trespass": "two led"}, {"trespass"}),
        ({"sign": ""}, {"fault"}),
        ({"heal_s": 8.0, "whole_s": 12.0, "exact_s": 10.0}, set[str]()),
    ],
)
def test_each_part_of_the_budget_counts(seen: dict[str, Any], names: set[str]) -> None:
    """What is over budget, and what was never seen, is missed; all else is kept."""
    assert missed(**seen) == names


def test_an_audit_that_is_never_clean_says_what_is_wrong() -> None:
    """Who reads the report of a missed drill learns what disagreed."""
    never = msgspec.structs.replace(WELL, exact_s=None, unclean="total m (+1)")
    (check,) = (
        each for each in judge(Recovery.OUT, Sign.OUT, BUDGET, never).checks if not each.passed
    )
    assert (check.name, check.seen) == ("exact", "not while it was watched: total m (+1)")


def test_a_struck_proxy_may_lose_its_own_streams_only() -> None:
    """Where the budget spares them, streams of the struck proxy do not count; others do."""
    spared = msgspec.structs.replace(BUDGET, spare_own=True, resent=None)
    assert missed(budget=spared, broken=3, own=3, resent=4) == set()
    assert missed(budget=spared, broken=4, own=3) == {"broken"}


def test_recovery_of_the_ledger_counts_from_redis_answering() -> None:
    """With Redis away no proxy can recover: the time begins when it answers again."""
    late: dict[str, Any] = {"answers_s": 9.0, "recovered_s": 9.9, "exact_s": 11.0, "whole_s": 8.0}
    assert missed(Recovery.LEDGER, **late) == set()
    assert missed(Recovery.OUT, **late) == {"recover"}
    assert starts_s(Recovery.LEDGER, 4.0, 6.0, None) == 6.0
    assert starts_s(Recovery.LEADER, 4.0, 6.0, 7.0) == 4.0


def samples(*facts: dict[str, Any]) -> list[Sample]:
    """Make samples at 1, 2, 3 … seconds."""
    there: dict[str, Any] = {"redis": True}
    return [Sample(at_s=n, **{**there, **each}) for n, each in enumerate(facts, 1)]


AB, B = frozenset({"a", "b"}), frozenset({"b"})
NOBODY = frozenset[str]()


@pytest.mark.parametrize(
    ("how", "struck", "facts", "at_s"),
    [
        (
            Recovery.OUT,
            Struck(replicas=frozenset({"a"})),
            [{"ready": B}, {"ready": AB}, {}, {"ready": B}],
            4.0,
        ),
        (Recovery.OUT, Struck(replicas=frozenset({"a"})), [{"ready": AB}] * 3, None),
        (
            Recovery.LEADER,
            Struck(leader="x"),
            [{"leader": "y"}, {"leader": "x"}, {"leader": ""}, {}, {"leader": "y"}],
            5.0,
        ),
        (
            Recovery.BACK,
            Struck(member="agent:h", pid=7),
            [{"members": each} for each in ({"agent:h": 9}, {"agent:h": 7}, {}, {"agent:h": 8})],
            4.0,
        ),
        (
            Recovery.REAPED,
            Struck(member="proxy:p"),
            [{"holders": frozenset(each)} for each in ("", "p", "q")],
            3.0,
        ),
        (
            Recovery.LEDGER,
            Struck(),
            [
                {"away": NOBODY},
                {"away": frozenset({"p"})},
                {"redis": False, "away": NOBODY},
                {"away": NOBODY},
            ],
            4.0,
        ),
        (
            Recovery.ROLLED,
            Struck(revision="new"),
            [
                {"whole": True, "revisions": frozenset({"new"})},
                {"whole": True, "revisions": frozenset({"old"})},
                {"whole": False, "revisions": frozenset({"new"})},
                {"whole": True, "revisions": frozenset({"old", "new"})},
                {"whole": True, "revisions": frozenset({"new"})},
            ],
            5.0,
        ),
        (Recovery.STREAMS, Struck(), [{"whole": True}] * 3, None),
    ],
)
def test_recovery_is_the_first_sample_that_shows_it(
    how: Recovery, struck: Struck, facts: list[dict[str, Any]], at_s: float | None
) -> None:
    """What was so before the fault proves nothing; what was not asked proves nothing either."""
    assert recovered_s(how, struck, samples(*facts), from_s=1.5) == at_s


def test_redis_answers_when_it_was_away_and_is_back() -> None:
    """The last return counts; one that was never seen away has no such time."""
    away, there = {"redis": False}, {"redis": True}
    assert answers_s(samples(there, away, there), fault_s=1.5) == 3.0
    assert answers_s(samples(there, away, there, away, there), fault_s=1.5) == 5.0
    assert answers_s(samples(away, there, there), fault_s=1.5) is None
    assert answers_s(samples(there, away), fault_s=1.5) is None
    one, other = {"redis_id": "a"}, {"redis_id": "b"}
    assert answers_s(samples(one, one, {}, other, other), fault_s=1.5) == 4.0
    assert answers_s(samples(one, away, one, other), fault_s=1.5) == 3.0
    assert answers_s(samples({}, other, one), fault_s=1.5) is None


def test_whole_is_since_the_last_break() -> None:
    """A mesh that was whole for a moment and then was not is whole only afterwards."""
    whole, broken, unknown = ({"whole": value} for value in (True, False, None))
    assert whole_s(samples(whole, broken, whole, unknown, whole), from_s=1.5) == 3.0
    assert whole_s(samples(whole, whole, broken), from_s=0) is None


def test_a_struck_leader_must_not_lead_again() -> None:
    """A thawed leader that leads after another has trespassed; before that it merely held on."""
    held, followed, back = {"leader": "x"}, {"leader": "y"}, {"leader": "x"}
    struck = Struck(leader="x")
    assert "x" in trespass(struck, samples(held, followed, {}, back))
    assert not trespass(struck, samples(held, held, {"leader": ""}, held, followed))
    assert not trespass(Struck(), samples(held, followed, back))


def request(
    outcome: Outcome = Outcome.OK,
    **fields: Any,  # noqa: ANN401 - fields of the struct
) -> Request:
    """Make a request that began at 1 s and ended at 3 s."""
    values: dict[str, Any] = {
        "began_s": 1.0,
        "first_s": 1.1,
        "ended_s": 3.0,
        "proxy": "http://p",
    }
    return Request(outcome=outcome, **{**values, **fields})


def test_traffic_is_sorted_by_what_clients_lost() -> None:
    """An error before the first byte, or instead of a stream, failed; later it broke a stream."""
    traffic = traffic_of(
        [
            request(),
            request(tries=2),
            request(Outcome.REFUSED, first_s=None),
            request(Outcome.STATUS),
            request(Outcome.RESET),
            request(Outcome.DIFFERENT, proxy="http://q"),
        ],
        fault_s=2.0,
        struck_url="http://q",
        compared=True,
    )
    assert (traffic.ok, traffic.failed, traffic.broken) == (2, 2, 2)
    assert (traffic.own, traffic.resent) == (1, 1)
    assert len(traffic.details) == 4


def test_waits_that_clients_noticed_end_with_the_last() -> None:
    """Only long waits that ended after the fault count; usual ones are no trouble."""
    requests = [
        request(gap_s=9.0, gap_ended_s=3.0),
        request(gap_s=0.5, gap_ended_s=8.0),
        request(gap_s=2.0, gap_ended_s=7.0),
        request(gap_s=2.0, gap_ended_s=99.0),
    ]
    assert waits_over_s(requests[:2], fault_s=4.0, usual_s=0.1, until_s=9.0) == 4.0
    assert waits_over_s(requests[:3], fault_s=4.0, usual_s=0.1, until_s=9.0) == 7.0
    assert waits_over_s(requests[:3], fault_s=4.0, usual_s=1.0, until_s=9.0) == 4.0
    assert waits_over_s(requests, fault_s=4.0, usual_s=0.1, until_s=9.0) == 9.0


def test_live_traffic_flows_at_half_its_rate() -> None:
    """Two seconds in a row at half the usual rate show that traffic flows; one does not."""
    rates = [10, 10, 10, 0, 6, 0, 5, 7, 9]
    seconds = [
        Second(at_s=n, requests=1, failed=0, tokens=rate, ttft_ms=None, in_flight=1)
        for n, rate in enumerate(rates)
    ]
    assert flowing_s(seconds, fault_s=3.2) == 6.0
    assert flowing_s(seconds[:5], fault_s=3.2) is None
    assert flowing_s([], fault_s=3.2) is None


def test_budgets_are_the_promises() -> None:
    """No fault but a proxy's own end may lose a request, and bounds follow from known times."""
    facts = Facts(lease_s=5, silence_s=3, probe_s=20, startup_s=30)
    budgets = {drill.fault: budget_of(drill, facts, 3) for drill in DRILLS.values()}
    assert all((each.failed, each.broken, each.drift) == (0, 0, 0) for each in budgets.values())
    assert {fault for fault, each in budgets.items() if each.spare_own} == {Fault.PROXY_KILL}
    ends = {fault for fault, each in budgets.items() if each.resent is None}
    assert ends == {Fault.PROXY_KILL, Fault.PROXY_DRAIN}
    assert budgets[Fault.REPLICA_KILL].recover_s == 1.0
    assert budgets[Fault.LEADER_KILL].recover_s == budgets[Fault.LEADER_FREEZE].recover_s == 7.5
    assert budgets[Fault.REDIS_FAILOVER].recover_s == 2.0
    assert all(each.drift_s == 10.0 for each in budgets.values())
    assert budgets[Fault.CUT_PROXY_REPLICA].recover_s == 17.0
    assert budgets[Fault.ROLL].recover_s == 90.0
