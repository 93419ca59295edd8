"""The signs of a fault: what shows that it struck, and what would be so without it, too."""

from typing import Any

import msgspec
import pytest

from services.cli.drill.catalogue import DRILLS
from services.cli.drill.live import Page
from services.cli.drill.records import Outcome, Request, Sample, Struck
from services.cli.drill.signs import Evidence, Sign, seen

STRUCK = Struck(replicas=frozenset({"a"}), member="proxy:p", pid=7, leader="x", revision="new")
AB, B = frozenset({"a", "b"}), frozenset({"b"})
UP: dict[str, Any] = {"redis": True}
DOWN: dict[str, Any] = {"redis": False}
OLD: dict[str, Any] = {"redis_id": "1", "oldest_ms": 50}
OTHER: dict[str, Any] = {"redis_id": "2", "oldest_ms": 50}


def evidence(*facts: dict[str, Any], **more: Any) -> Evidence:  # noqa: ANN401 - fields
    """Make samples at 0, 1, 2 … seconds; the fault strikes at 1.5 and ends at 5.5."""
    return Evidence(
        struck=STRUCK,
        samples=[Sample(at_s=n, **{**UP, **each}) for n, each in enumerate(facts)],
        fault_s=1.5,
        heal_s=5.5,
        fault_ms=1000,
        **more,
    )


@pytest.mark.parametrize(
    ("sign", "without", "showing"),
    [
        (Sign.OUT, {"ready": AB}, {"ready": B}),
        (Sign.GONE, {"members": {"proxy:p": 7}}, {"members": {"proxy:p": 8}}),
        (Sign.GONE, {"members": {"proxy:p": 7}}, {"members": {}}),
        (Sign.FOLLOWED, {"leader": "x"}, {"leader": "y"}),
        (Sign.APART, {"away": frozenset({"q"})}, {"away": frozenset({"q", "p"})}),
        (Sign.REPLACED, OLD, OTHER),
        (Sign.EMPTIED, OLD, {**OTHER, "oldest_ms": 1200}),
        (Sign.EMPTIED, OLD, {**OTHER, "oldest_ms": 0}),
        (Sign.LEFT, {"moved": 3.0}, {"moved": 5.0}),
        (
            Sign.ROLLED,
            {"revisions": frozenset({"old", "new"})},
            {"revisions": frozenset({"new"})},
        ),
    ],
)
def test_a_sign_is_what_only_the_fault_brings(
    sign: Sign, without: dict[str, Any], showing: dict[str, Any]
) -> None:
    """Seen once since the fault it counts; before it, or in looks that asked nothing, it does not.

    The words say when, or how much.
    """
    assert not seen(sign, evidence(without, without, without, {}, without))
    if sign is not Sign.LEFT and sign not in {Sign.REPLACED, Sign.EMPTIED}:
        assert not seen(sign, evidence(without, showing, {}, without))
    shown = seen(sign, evidence(without, without, without, showing))
    assert shown == ("2 went elsewhere" if sign is Sign.LEFT else "after 1.50 s")


def test_an_emptied_redis_is_another_one_without_what_there_was() -> None:
    """A restart with its data, or a gap in what was held by the same process, is none."""
    assert not seen(Sign.EMPTIED, evidence(OLD, OLD, DOWN, OTHER))
    assert not seen(Sign.EMPTIED, evidence(OLD, OLD, {**OLD, "oldest_ms": 1200}))
    nothing = {**OLD, "oldest_ms": 0}
    assert not seen(Sign.EMPTIED, evidence(nothing, nothing, {**OTHER, "oldest_ms": 0}))


def test_a_redis_that_says_not_who_it_is() -> None:
    """Where nobody may ask which process answers, that none did for a look must do."""
    assert seen(Sign.REPLACED, evidence({}, {}, DOWN, {})) == "after 0.50 s"
    assert not seen(Sign.REPLACED, evidence({}, DOWN, {}, {}))
    assert not seen(Sign.REPLACED, evidence(OLD, OLD, DOWN, OLD))


@pytest.mark.parametrize(
    ("facts", "shown"),
    [
        ([UP, UP, DOWN, DOWN, DOWN, UP], "3 looks in a row"),
        ([UP, UP, DOWN, UP, DOWN, UP], ""),
        ([DOWN, DOWN, UP, UP], ""),
        ([UP, UP, UP], ""),
    ],
)
def test_a_silent_redis_is_silent_for_long(facts: list[dict[str, Any]], shown: str) -> None:
    """One late look is a busy machine; looks in a row, for half the time, are the fault."""
    assert seen(Sign.SILENT, evidence(*facts)) == shown
    longer = msgspec.structs.replace(evidence(*facts), heal_s=11.5)
    assert not seen(Sign.SILENT, longer)


def test_requests_that_waited_for_the_cut_replica_show_it() -> None:
    """Where nothing may go elsewhere in time, waits of half the fault's length are its sign."""

    def waited(gap_s: float, until_s: float) -> Request:
        return Request(
            outcome=Outcome.OK,
            began_s=0.0,
            first_s=0.1,
            ended_s=9.0,
            proxy="http://p",
            gap_s=gap_s,
            gap_ended_s=until_s,
        )

    still = {"moved": 3.0}
    facts = (still, still, still)
    assert not seen(Sign.LEFT, evidence(*facts, requests=[waited(1.9, 4.0), waited(3.0, 1.0)]))
    shown = seen(Sign.LEFT, evidence(*facts, requests=[waited(2.5, 4.0), waited(2.0, 5.0)]))
    assert shown == "2 waited up to 2.50 s"


def test_proxies_count_what_goes_elsewhere() -> None:
    """Tries and streams of the model that lost their replica, for whatever reason, are added up."""
    page = Page(
        'redmesh_proxy_retries_total{model="m",reason="connect"} 2.0\n'
        'redmesh_proxy_retries_total{model="m",reason="reset"} 3.0\n'
        'redmesh_proxy_retries_total{model="other",reason="reset"} 50.0\n'
        'redmesh_proxy_stream_failovers_total{model="m",outcome="exact"} 4.0\n'
        'redmesh_proxy_requests_total{model="m",outcome="2xx"} 7.0\n',
        "m",
    )
    assert (page.counts.moved, page.counts.ok) == (9.0, 7.0)


def test_what_the_injector_saw_is_told() -> None:
    """Cut connections come back before a look can miss them: who cut them says how many."""
    assert seen(Sign.DISCONNECTED, evidence(DOWN, DOWN, DOWN)) == ""
    assert seen(Sign.DISCONNECTED, evidence({}, told="9 were cut")) == "9 were cut"


def test_every_drill_has_a_sign_of_its_fault() -> None:
    """No drill passes by what would be so without its fault; every sign is some drill's."""
    assert {drill.sign for drill in DRILLS.values()} == set(Sign)
