from services.controller.backoff import ROUNDS_KEPT, assess, pause_ms
from shared.models.replica import Replica, ReplicaState


def failed(at_ms: int, *, born_ms: int | None = None, rid: str = "", reason: str = "") -> Replica:
    """Make a record that failed at `at_ms`."""
    return Replica(
        rid=rid or f"m-{at_ms}",
        model="m",
        gen=at_ms - 100 if born_ms is None else born_ms,
        state=ReplicaState.FAILED,
        host="h",
        revision="r",
        since_ms=at_ms,
        reason=reason,
    )


def test_pauses_double_up_to_a_minute() -> None:
    """Failures in a row pause for 1, 2, 4 … and never more than 60 seconds."""
    assert [pause_ms(n) // 1000 for n in range(9)] == [0, 1, 2, 4, 8, 16, 32, 60, 60]


def test_no_failures_no_pause() -> None:
    """Without failures nothing waits."""
    backoff = assess([])
    assert (backoff.rounds, backoff.next_try_ms) == (0, 0)


def test_failures_that_happen_together_are_one() -> None:
    """Twenty replicas that die with their host within a second count as one failure."""
    backoff = assess([failed(10_000 + n, rid=f"m-{n:02}") for n in range(20)])
    assert backoff.rounds == 1
    assert backoff.next_try_ms == 11_000
    assert backoff.evidence == ("m-00",)


def test_failures_one_after_another_count_each() -> None:
    """Each failure after the pause of the one before is another round; the newest reason shows."""
    backoff = assess([failed(10_000), failed(12_000), failed(15_000, reason="out of memory")])
    assert backoff.rounds == 3
    assert backoff.next_try_ms == 19_000
    assert backoff.last_reason == "out of memory"


def test_a_replica_that_lived_long_starts_the_count_anew() -> None:
    """A failure after five minutes of life is no crash loop."""
    backoff = assess([failed(10_000), failed(12_000), failed(500_000, born_ms=100_000)])
    assert backoff.rounds == 1
    assert backoff.next_try_ms == 501_000


def test_evidence_is_bounded_and_enough() -> None:
    """The records that are kept lead to the same pause as all of them would."""
    history: list[Replica] = []
    at_ms = 10_000
    for _ in range(30):
        history.append(failed(at_ms))
        backoff = assess(history)
        history = [r for r in history if r.rid in backoff.evidence]
        assert len(history) <= ROUNDS_KEPT
        at_ms = backoff.next_try_ms + 5_000
    assert assess(history).next_try_ms - history[-1].since_ms == 60_000


def test_the_order_of_records_does_not_matter() -> None:
    """Whoever reads the records in whatever order waits the same time."""
    records = [failed(n * 3_000 + 10_000) for n in range(6)]
    assert assess(records) == assess(reversed(records))
