"""What the ledger carries is judged at two proxies, and only where the ledger decided. No I/O."""

import pytest

from tests.bench.ledger import LedgerOutcome, judge
from tests.bench.reserving import Reserving


def measure(
    replicas: int,
    pairs_per_s: float,
    *,
    proxies: int = 2,
    proxy_us: float = 10.0,
    local: int = 0,
) -> Reserving:
    """Make a measure."""
    return Reserving(
        replicas=replicas,
        proxies=proxies,
        processes=2,
        pairs_per_s=pairs_per_s,
        ops_per_batch=32.0,
        proxy_us=proxy_us,
        redis_us=15.0,
        script_us=12.0,
        local=local,
    )


GOOD = measure(10, 60_000.0)


@pytest.mark.parametrize(
    ("worse", "good"),
    [
        (measure(1000, 50_000.0), True),
        (measure(1000, 49_999.0), False),
        (measure(1000, 60_000.0, proxy_us=15.1), False),
        (measure(1000, 60_000.0, local=1), False),
        (measure(1000, 1_000.0, proxies=1), True),
    ],
)
def test_the_ledger_is_judged(worse: Reserving, *, good: bool) -> None:
    """Too few pairs, too dear ones or local ones are bad; one proxy alone has no bound."""
    measures = [GOOD, worse]
    outcome = LedgerOutcome(measures=measures, bounds=judge(measures))
    assert outcome.good == good
    assert ("MISSED" in outcome.text()) != good


def test_the_ledger_must_be_flat() -> None:
    """With a thousand replicas it must carry nearly what it carries with ten."""
    measures = [measure(10, 100_000.0), measure(1000, 79_000.0)]
    assert [bound.kept for bound in judge(measures)][-2] is False
    assert [bound.kept for bound in judge([measures[0], measure(1000, 81_000.0)])][-2]
