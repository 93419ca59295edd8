"""The pure rules: retry, budgets, breakers, cost, waiting, and reading of requests and streams."""

import asyncio
import gc
import json
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.proxy.admission import may_wait, retry_after_s
from services.proxy.breaker import RedisBreaker, ReplicaBreaker
from services.proxy.cost import OutputEstimate, prompt_tokens
from services.proxy.inbound import (
    RefusedError,
    inbound,
    named_model,
    peek,
    request_id_of,
    with_model,
)
from services.proxy.plaintext import TextStream
from services.proxy.retry import Budget, Failure, Situation, Verdict, classify, decide
from services.proxy.stepping import begin, step
from services.proxy.waiting import WaitingRoom


@pytest.mark.parametrize(
    ("status", "body", "failure"),
    [
        (200, b"", None),
        (404, b"EngineCore encountered an issue", None),
        (429, b"", None),
        (500, b"boom", None),
        (500, b"EngineCore encountered an issue. See", Failure.ENGINE_DEAD),
        (502, b"", Failure.GATEWAY),
        (503, b"", Failure.REJECTED),
        (504, b"", Failure.GATEWAY),
    ],
)
def test_classify(status: int, body: bytes, failure: Failure | None) -> None:
    """Only answers that a replica did not really give are failures."""
    assert classify(status, body) is failure


@pytest.mark.parametrize(
    ("failure", "tries", "others", "left_s", "verdict"),
    [
        (Failure.CONNECT, 0, 1, 9, Verdict.ELSEWHERE),
        (Failure.CONNECT, 0, 0, 9, Verdict.LATER),
        (Failure.RESET, 1, 0, 9, Verdict.LATER),
        (Failure.RESET, 2, 5, 9, Verdict.ELSEWHERE),
        (Failure.RESET, 3, 5, 9, Verdict.GIVE_UP),
        (Failure.RESET, 1, 5, 0, Verdict.GIVE_UP),
        (Failure.REJECTED, 1, 1, 9, Verdict.ELSEWHERE),
        (Failure.REJECTED, 1, 0, 9, Verdict.GIVE_UP),
        (Failure.WITHDRAWN, 1, 0, 9, Verdict.LATER),
    ],
)
def test_decide(failure: Failure, tries: int, others: int, left_s: float, verdict: Verdict) -> None:
    """Elsewhere while there is somewhere, later while it may help, else the client is told."""
    situation = Situation(failure, tries, others, left_s)
    assert decide(situation, max_tries=3) is verdict


def test_budget() -> None:
    """Retries above the floor are delayed, not refused; traffic earns more, time refills."""
    budget = Budget(0.0, ratio=0.1, floor=10)
    assert [budget.delay_s(0.0) for _ in range(10)] == [0.0] * 10
    assert budget.delay_s(0.0) == pytest.approx(1.0)
    assert budget.delay_s(0.0) == pytest.approx(2.0)
    assert budget.delay_s(100.0) == 0.0
    for _ in range(100):
        budget.request()
    assert sum(budget.delay_s(100.0) == 0.0 for _ in range(40)) == 19


def test_replica_breaker() -> None:
    """Three failures in a row eject for 5 s, then longer up to 30 s; an answer forgives all."""
    breaker = ReplicaBreaker()
    assert [breaker.failed(0.0) for _ in range(3)] == [False, False, True]
    assert breaker.ejected(4.9)
    assert not breaker.ejected(5.0)
    assert breaker.failed(5.0)
    assert breaker.ejected(14.9)
    assert not breaker.ejected(15.0)
    assert breaker.failed(15.0)
    assert breaker.failed(40.0)
    assert breaker.ejected(69.9)
    assert not breaker.ejected(70.0)
    breaker.answered()
    assert not breaker.ejected(50.0)
    assert not breaker.failed(50.0)


def test_redis_breaker() -> None:
    """Misses must be in a row; only a fast beat closes it again."""
    breaker = RedisBreaker()
    for _ in range(4):
        assert not breaker.missed(1.0)
    breaker.answered()
    assert [breaker.missed(1.0) for _ in range(5)][-1]
    breaker.answered()
    assert breaker.open
    assert breaker.away_s(4.0) == 3.0
    assert breaker.fast_beat()
    assert not breaker.open
    assert not breaker.fast_beat()


@pytest.mark.parametrize(
    ("raw", "tokens"),
    [
        (b"", 1),
        (b'"' + b"x" * 398 + b'"', 101),
        (b"[1,2,3]", 3),
        (b"[[1,2],[3,4]]", 4),
        (b"[ 5 ]", 1),
        (b'["ab","cd"]', 3),
    ],
)
def test_prompt_tokens(raw: bytes, tokens: int) -> None:
    """Token ids are counted, text is estimated by its bytes."""
    assert prompt_tokens(raw) == tokens


def test_output_estimate() -> None:
    """The client's bound counts, but no more than what this model's answers are like."""
    estimate = OutputEstimate()
    assert estimate.expect(5) == 5
    assert estimate.expect(None) == estimate.expect(100_000) == 512
    for _ in range(200):
        estimate.observe(10)
    assert 18 <= estimate.expect(100_000) <= 24
    assert estimate.expect(5, choices=3) == 15


def test_admission() -> None:
    """Waiting is bounded, and Retry-After follows the rate at which requests end."""
    assert may_wait(3, 4)
    assert not may_wait(4, 4)
    assert retry_after_s(99, 10.0) == 10
    assert retry_after_s(0, 1000.0) == 1
    assert retry_after_s(9999, 1.0) == 30
    assert retry_after_s(5, 0.0) == 5


class Waits:
    """A waiter that notes its turn."""

    def __init__(self, name: str, turns: list[str], *, held: bool = True) -> None:
        self.name = name
        self.turns = turns
        self.held = held

    def try_again(self) -> None:
        """Note the turn."""
        self.turns.append(self.name)


def test_waiting_keeps_its_order() -> None:
    """First come, first served; who was woken in vain keeps the place it had."""
    room = WaitingRoom()
    turns: list[str] = []
    tickets = {name: room.ticket() for name in "abc"}
    waiters = {name: Waits(name, turns) for name in "abc"}
    for name in "bca":
        room.enter(tickets[name], waiters[name])
    room.wake(1)
    room.enter(tickets["a"], waiters["a"])
    waiters["b"].held = False
    room.wake_all()
    assert turns == ["a", "a", "c"]


def test_waiting_room_forgets_who_left() -> None:
    """When nobody waits any more, nothing is kept of those that gave up."""
    room = WaitingRoom()
    waiter = Waits("a", [])
    gone = weakref.ref(waiter)
    room.enter(room.ticket(), waiter)
    waiter.held = False
    room.left()
    del waiter
    gc.collect()
    assert gone() is None


def test_peek_reads_only_what_matters() -> None:
    """Fields of unknown or wrong type are the engine's business; the estimate copes."""
    given_fields = peek(b'{"model":"m","max_tokens":"7","stream":"yes","n":2,"x":{"y":[1]}}')
    assert named_model(given_fields) == "m"
    request = inbound(b"/p", b"", b"id", given_fields)
    assert (request.client_limit_tokens, request.choices) == (None, 2)
    more = peek(b'{"model":"m","max_completion_tokens":9,"max_tokens":5,"prompt":[1,2,3]}')
    request = inbound(b"/p", b"", b"id", more)
    assert (request.client_limit_tokens, request.prompt_tokens) == (9, 3)


@given(st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=20), max_size=5))
def test_with_model_changes_only_the_model(fields: dict[str, int | str]) -> None:
    """Setting the model leaves every other field as it was."""
    rewritten = json.loads(with_model(json.dumps(fields).encode(), "org/m"))
    assert rewritten == {**fields, "model": "org/m"}


def test_with_model_needs_an_object() -> None:
    """A body that is no object is refused."""
    with pytest.raises(RefusedError):
        with_model(b"[]", "m")


@pytest.mark.parametrize("bad", [b"", b"-x", b"a b", b"x" * 129, b"a\r\nb", "é".encode()])
def test_request_ids(bad: bytes) -> None:
    """Only ids that are safe in a header and a log are kept."""
    assert request_id_of(b"req_1:a/b=") == b"req_1:a/b="
    assert request_id_of(bad) != bad


@given(st.data())
def test_text_of_a_stream_cut_anywhere(data: st.DataObject) -> None:
    """However the bytes of a stream are cut, the text is the same."""
    raw = (
        'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\r\n\r\n'
        ": keep-alive\n\n"
        'data: {"choices":[{"delta":{"content":"héé\\n"}}]}\n\n'
        'data: {"choices":[{"delta":{"content":"🙂"},"finish_reason":"stop"}]}\n\n'
        'data: {"choices":[],"usage":{}}\n\ndata: [DONE]\n\n'
    ).encode()
    stream = TextStream()
    text = b""
    at = 0
    while at < len(raw):
        size = data.draw(st.integers(1, 40))
        text += stream.feed(raw[at : at + size])
        at += size
    assert text.decode() == "héé\n🙂"
    assert stream.finished
    assert not stream.error


def test_text_errors() -> None:
    """An error event and a chunk that does not parse are told apart from text."""
    stream = TextStream()
    assert stream.feed(b'data: {"error":{"message":"no"}}\n\n') == b""
    assert stream.error == "no"
    stream = TextStream()
    stream.feed(b"data: {nonsense\n\n")
    assert "does not parse" in stream.error


async def test_stepping() -> None:
    """A coroutine that need not wait is done in one step; any other can be awaited to its end."""
    event = asyncio.Event()
    log: list[str] = []

    async def work(name: str) -> str:
        log.append(f"{name} begins")
        await event.wait()
        log.append(f"{name} ends")
        return name

    rest = step(work("slow"))
    assert rest is not None
    assert log == ["slow begins"]
    event.set()
    assert await rest == "slow"
    assert step(work("fast")) is None
    assert begin(work("again")) == ("again", None)
    assert log[-1] == "again ends"


async def test_stepping_cancelled() -> None:
    """Cancelling what is left of a coroutine runs its cleanup."""
    cleaned = False

    async def work() -> None:
        nonlocal cleaned
        try:
            await asyncio.Event().wait()
        finally:
            cleaned = True

    rest = step(work())
    assert rest is not None

    async def finish() -> None:
        await rest

    task = asyncio.create_task(finish())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned
