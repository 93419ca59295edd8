import msgspec
import pytest

from services.cli.audit import (
    FULL,
    Kind,
    Live,
    ModelSample,
    expected_score,
    findings_of,
    judge,
)
from shared.models.routing import Lease

WEIGHT = "1000 2 0"


def sample(**more: object) -> ModelSample:
    """One request of 10 tokens on r1 through px, all in agreement."""
    agreeing = ModelSample(
        leases={"px": {"q": Lease(request="q", rid="r1", cost_tokens=10)}},
        requests={"r1": 1, "*": 1},
        costs={"r1": 10, "*": 10},
        ready={"r1": 10_000.0, "r2": 0.0},
        weights={"r1": WEIGHT, "r2": WEIGHT},
        live={"px": {"q": Live("r1", 10)}},
        engines={"r1": 1, "r2": 0},
    )
    return msgspec.structs.replace(agreeing, **more)


def _kinds(one: ModelSample) -> list[Kind]:
    return [finding.kind for finding in findings_of({"m": one})]


def test_accounts_that_agree_give_no_finding() -> None:
    """Ledger, proxies and engines that agree are clean."""
    assert findings_of({"m": sample()}) == []


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"requests": {"r1": 2, "*": 2}, "ready": {}}, Kind.REQUESTS),
        ({"requests": {"r1": 1, "*": 3}}, Kind.REQUESTS),
        ({"costs": {"r1": 11}, "ready": {}}, Kind.COST),
        ({"costs": {"r1": 10, "gone": 5}}, Kind.COST),
        ({"ready": {"r1": 9_000.0}}, Kind.SCORE),
        ({"live": {"px": {}}, "engines": {}}, Kind.LEASE_WITHOUT_REQUEST),
        ({"live": {"px": {"q": Live("r2", 10)}}}, Kind.LEASE_DIFFERS),
        ({"live": {"px": {"q": Live("r1", 9)}}}, Kind.LEASE_DIFFERS),
        ({"live": {}, "engines": {}}, Kind.LEASE_OF_UNKNOWN_PROXY),
        ({"live": {"px": None}}, Kind.PROXY_SILENT),
        ({"engines": {"r1": 9}}, Kind.ENGINE),
    ],
)
def test_each_disagreement_is_named(change: dict[str, object], kind: Kind) -> None:
    """A change of one account gives a finding of its kind, and of no wrong one."""
    assert set(_kinds(sample(**change))) == {kind}


def test_a_request_that_the_ledger_lacks_is_found() -> None:
    """A proxy that relays without reservation is drift, though all of the ledger agrees."""
    empty = sample(leases={}, requests={}, costs={}, ready={"r1": 0.0})
    assert _kinds(empty) == [Kind.REQUEST_WITHOUT_LEASE]


def test_an_orphan_on_a_quiet_engine_is_found() -> None:
    """While nothing is in flight, one request that an engine still computes is drift."""
    quiet = sample(leases={}, requests={}, costs={}, ready={}, live={"px": {}}, engines={"r1": 1})
    assert _kinds(quiet) == [Kind.ENGINE]


def test_engines_may_lag_under_load() -> None:
    """Under load an engine's report is a second old: a few requests more or less are no drift."""
    assert _kinds(sample(engines={"r1": 4})) == []
    assert _kinds(sample(engines={"r1": 0})) == []


def test_what_one_look_only_shows_is_a_race() -> None:
    """A request that ends while the fleet is read is no drift: the next look does not show it."""
    ended = sample(live={"px": {}}, engines={})
    assert judge([{"m": ended}, {"m": sample()}]) == []
    assert [each.kind for each in judge([{"m": ended}, {"m": ended}])] == [
        Kind.LEASE_WITHOUT_REQUEST
    ]


def test_totals_that_are_off_by_changing_amounts_are_races() -> None:
    """A total that is off by another amount in each look moved while it was read; drift stays."""
    one = sample(costs={"r1": 11}, ready={})
    two = sample(costs={"r1": 12}, ready={})
    assert judge([{"m": one}, {"m": two}]) == []
    assert [each.delta for each in judge([{"m": one}, {"m": one}])] == [1]


def test_an_engine_that_is_off_in_the_same_direction_is_drift() -> None:
    """An engine's surplus may change with the load; that it stays a surplus is what counts."""
    looks = [{"m": sample(engines={"r1": running})} for running in (20, 30)]
    assert [each.kind for each in judge(looks)] == [Kind.ENGINE]


@pytest.mark.parametrize(
    ("cost", "requests", "weight", "score"),
    [
        (10, 1, "1000 256 0", 10_000.0),
        (10, 1, "500 256 7", 5_007.0),
        (10, 2, "1000 2 0", FULL + 10_000),
        (10, 0, "1000 0 0", FULL + 10_000),
        (10**15, 1, "1000 256 0", FULL - 1),
        (10, 1, "nonsense", 10_000.0),
        (10, 1, "", 10_000.0),
    ],
)
def test_the_score_is_that_of_the_scripts(
    cost: int, requests: int, weight: str, score: float
) -> None:
    """Score = cost × inverse throughput + penalty, below 4e15, + 4e15 at the cap."""
    assert expected_score(cost, requests, weight) == score
