"""The scheduler: budget, capacity, preemption, prefix cache and queue limits, without a clock."""

from random import Random

import msgspec

from services.simengine.kv import BlockPool
from services.simengine.scheduler import (
    Limits,
    Rejection,
    Scheduler,
    Sequence,
    SequenceState,
    StepCost,
)

LIMITS = Limits(
    max_model_len=256,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    kv_tokens=1024,
    block_tokens=16,
    prefix_caching=True,
    max_queued_requests=None,
    max_queued_tokens=None,
)
COST = StepCost(step_ms=10.0, prefill_us_per_token=100.0, decode_us_per_seq=1000.0)


def make(**changes: object) -> Scheduler:
    """Make a scheduler with some limits changed."""
    return Scheduler(msgspec.structs.replace(LIMITS, **changes), COST)


def prompt(tokens: int, start: int = 0) -> Sequence:
    """Make a sequence with a prompt of its own."""
    return Sequence(list(range(start, start + tokens)), arrived_s=0.0)


def step(scheduler: Scheduler) -> list[Sequence]:
    """Run one step; every due sequence gets a token."""
    planned = scheduler.plan(0.0)
    assert planned is not None
    due = scheduler.complete(planned)
    for sequence in due:
        scheduler.append(sequence, 7)
    assert scheduler.pool.broken_invariant() is None
    return due


def test_an_idle_engine_plans_nothing() -> None:
    """Without sequences there is no step."""
    assert make().plan(0.0) is None


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    """A prompt of 150 tokens under a budget of 64 is due its first token in the third step."""
    scheduler = make()
    sequence = prompt(150)
    scheduler.add(sequence)
    assert [len(step(scheduler)) for _ in range(3)] == [0, 0, 1]


def test_running_sequences_go_before_waiting_ones() -> None:
    """A decode is never starved by prompts: its token is in every step."""
    scheduler = make()
    first = prompt(10)
    scheduler.add(first)
    step(scheduler)
    scheduler.add(prompt(200, 1000))
    for _ in range(3):
        assert first in step(scheduler)


def test_no_more_than_max_num_seqs_run() -> None:
    """The rest wait, in order of arrival."""
    scheduler = make()
    sequences = [prompt(5, 100 * at) for at in range(6)]
    for sequence in sequences:
        scheduler.add(sequence)
    step(scheduler)
    assert (scheduler.running, scheduler.waiting) == (4, 2)
    scheduler.remove(sequences[0])
    step(scheduler)
    assert [sequence.state for sequence in sequences[4:]] == [
        SequenceState.RUNNING,
        SequenceState.WAITING,
    ]


def test_a_step_takes_base_and_prefill_and_decode_time() -> None:
    """Duration is 10 ms, plus 0.1 ms a prompt token, plus 1 ms a decoding sequence."""
    scheduler = make()
    scheduler.add(prompt(20))
    planned = scheduler.plan(0.0)
    assert planned is not None
    assert round(planned.duration_s, 6) == 0.012
    for sequence in scheduler.complete(planned):
        scheduler.append(sequence, 7)
    planned = scheduler.plan(0.0)
    assert planned is not None
    assert round(planned.duration_s, 6) == 0.011


def test_a_full_cache_preempts_the_latest_and_everyone_still_finishes() -> None:
    """With room for 4 blocks two growing sequences collide; the later is recomputed, not lost."""
    scheduler = make(kv_tokens=64, prefix_caching=False, max_model_len=64)
    first, second = prompt(20), prompt(20, 500)
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(200):
        for sequence in step(scheduler):
            if len(sequence.ids) >= 60:
                scheduler.remove(sequence)
        if not scheduler.running and not scheduler.waiting:
            break
    assert scheduler.preemptions > 0
    assert len(first.ids) == len(second.ids) == 60
    assert scheduler.pool.used_blocks == 0


def test_the_same_prefix_is_computed_once() -> None:
    """A second prompt that shares 4 full blocks computes only the rest."""
    scheduler = make()
    scheduler.add(prompt(70))
    while not step(scheduler):
        pass
    again = Sequence([*range(70), 900], arrived_s=0.0)
    scheduler.add(again)
    assert again in step(scheduler)
    assert again.cached_tokens == 64
    assert scheduler.prefix_hit_tokens == 64


def test_a_salt_keeps_caches_apart() -> None:
    """The same prompt under another salt shares nothing."""
    scheduler = make()
    scheduler.add(prompt(70))
    while not step(scheduler):
        pass
    salted = Sequence(list(range(70)), arrived_s=0.0, salt="tenant")
    scheduler.add(salted)
    step(scheduler)
    assert salted.cached_tokens == 0


def test_the_prefix_cache_forgets_the_least_recently_used() -> None:
    """A cached block nobody uses gives way when room is needed, the oldest first."""
    pool = BlockPool(2)
    assert pool.take(2)
    assert pool.seal(1)
    assert pool.seal(2)
    pool.release([1], 0)
    pool.release([2], 0)
    assert pool.take(1)
    assert pool.share_prefix([1]) == 0
    assert pool.share_prefix([2]) == 1
    assert not pool.take(1)


def test_the_request_limit_counts_running_and_waiting() -> None:
    """With a limit of 3, a fourth is refused whether the three run or wait."""
    scheduler = make(max_queued_requests=3, max_num_seqs=2)
    for at in range(3):
        assert scheduler.rejection(5) is None
        scheduler.add(prompt(5, 100 * at))
    step(scheduler)
    assert scheduler.rejection(5) is Rejection.REQUESTS


def test_the_token_limit_bounds_prompts_not_yet_computed() -> None:
    """One large prompt is admitted when idle, a second not until the first is computed."""
    scheduler = make(max_queued_tokens=50)
    assert scheduler.rejection(200) is None
    scheduler.add(prompt(200))
    assert scheduler.rejection(10) is Rejection.TOKENS
    while not step(scheduler):
        pass
    assert scheduler.rejection(10) is None


def test_books_balance_under_any_history() -> None:
    """Random arrivals, ends and aborts never break the block books and leave nothing behind."""
    random = Random(42)
    scheduler = make(kv_tokens=256, max_num_seqs=6)
    live: list[Sequence] = []
    for _ in range(2000):
        if random.random() < 0.3:
            sequence = prompt(random.randint(1, 120), random.choice([0, 0, 1000, 2000]))
            scheduler.add(sequence)
            live.append(sequence)
        if live and random.random() < 0.1:
            scheduler.remove(live.pop(random.randrange(len(live))))
        if scheduler.running or scheduler.waiting:
            for sequence in step(scheduler):
                if len(sequence.ids) > 200 or random.random() < 0.05:
                    scheduler.remove(sequence)
                    live.remove(sequence)
    for sequence in live:
        scheduler.remove(sequence)
    assert scheduler.pool.used_blocks == 0
    assert scheduler.rejection(1) is None
    assert scheduler.pool.broken_invariant() is None
