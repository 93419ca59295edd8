"""Replicas that answer what no engine should: no request hangs, and no two answers are mixed."""

import asyncio
import json
from typing import Any

import msgspec
import pytest

from services.proxy import reservations
from services.proxy.continuation.memo import Memo
from services.proxy.continuation.plan import Continuation, plan
from services.proxy.continuation.tape import ODD_IDS, Options, Tape
from shared.models.deployment import StreamFailover
from shared.registry.ledger import MAX_CANDIDATES, Adopt
from tests.support.waiting import wait_until
from tests.unit.proxy.engine import Engine, Exchanged
from tests.unit.proxy.rig import Rig, replica

PATIENCE_S = 5.0
CHAT = "/v1/chat/completions"
ODD = (-1, 1 << 32, 10**10, 10**25)
"""Token ids that are none: no engine takes them, and they do not fit 32 bits."""


def event(text: str, *ids: int, finish: str | None = None, **fields: Any) -> bytes:  # noqa: ANN401 - JSON
    """Make a chat's chunk in vLLM's very bytes."""
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", **fields}
    chunk = {**head, "choices": [{**choice, "token_ids": ids}]}
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def going_on(tape: Tape, **fields: object) -> Continuation:
    """Have a stream go on elsewhere, which must be possible."""
    asked = json.dumps({"messages": [], "temperature": 0, "max_tokens": 99, **fields}).encode()
    planned = plan(CHAT.encode(), asked, tape, StreamFailover.EXACT, context_tokens=0)
    assert isinstance(planned, Continuation)
    return planned


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 999 X\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 600 X\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 099 X\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 101 X\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
        b"HTTP/1.1 200 X\r\ncontent-length: 2\r\n\r\n{}HTTP/1.1 200 X\r\ncontent-length: 0\r\n\r\n",
    ],
)
async def test_no_answer_at_all(head: bytes) -> None:
    """A status that is none, another protocol, or two answers at once count as no answer."""

    async def odd(exchanged: Exchanged) -> None:
        exchanged.writer.write(head)
        await exchanged.writer.drain()

    async with Engine(odd) as bad, Engine() as good, Rig(bad, good) as rig:
        answer = await asyncio.wait_for(rig.chat(), PATIENCE_S)
        assert answer.status_code == 200
        assert answer.json()["object"] == "chat.completion"
        assert good.seen
        await wait_until(rig.idle)


@pytest.mark.parametrize("status", [204, 304])
async def test_answer_without_a_body(status: int) -> None:
    """An answer that by its status has no body is whole with its head."""

    async def nothing(exchanged: Exchanged) -> None:
        exchanged.writer.write(b"HTTP/1.1 %d X\r\n\r\n" % status)
        await exchanged.writer.drain()

    async with Engine(nothing) as engine, Rig(engine) as rig:
        answer = await asyncio.wait_for(rig.chat(), PATIENCE_S)
        assert answer.status_code == status
        assert len(engine.seen) == 1
        await wait_until(rig.idle)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:99999", "http://127.0.0.1:x", f"http://{'x' * 80}:80", "http://[::1:80"],
)
async def test_url_that_makes_no_sense(url: str) -> None:
    """A replica whose URL makes no sense cannot be reached: another one answers, all at once."""
    async with Engine() as engine, Rig(engine) as rig:
        rig.change(replica("demo-0", url), replica("demo-1", engine.url))
        calls = [rig.chat() for _ in range(4)]
        answers = await asyncio.wait_for(asyncio.gather(*calls), PATIENCE_S)
        assert {answer.status_code for answer in answers} == {200}
        await wait_until(rig.idle)


async def test_replica_that_the_table_lacks() -> None:
    """While the ledger offers a replica whose record does not parse, the others serve."""
    async with Engine() as engine, Rig(engine) as rig:
        rig.ledger.ready = {"ghost": replica("ghost", ""), "demo-0": rig.replicas[0]}
        for _ in range(3):
            answer = await asyncio.wait_for(rig.chat(), PATIENCE_S)
            assert answer.status_code == 200
        await wait_until(rig.idle)


async def test_more_strangers_than_can_be_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many unknown replicas the ledger offers, a request is soon sent by the table."""
    # An answer that a busy machine delays would be a reason of its own to do without the ledger.
    monkeypatch.setattr(reservations, "RESERVE_DEADLINE_S", PATIENCE_S)
    async with Engine() as engine, Rig(engine) as rig:
        strangers = {f"ghost-{n}": replica(f"ghost-{n}", "") for n in range(1000)}
        rig.ledger.ready = {**strangers, "demo-0": rig.replicas[0]}
        answer = await asyncio.wait_for(rig.chat(), PATIENCE_S)
        assert answer.status_code == 200
        assert len(rig.ledger.reserves()) == MAX_CANDIDATES + 1

        def adopted() -> set[str]:
            return {op.rid for batch in rig.ledger.batches for op in batch if isinstance(op, Adopt)}

        await wait_until(lambda: adopted() == {"demo-0"}, what="the ledger is told")
        await wait_until(rig.idle)


async def test_replica_that_the_table_learns_of() -> None:
    """A request that was offered a replica before the table had it gets it as soon as it has."""
    async with Engine() as engine, Rig() as rig:
        rig.ledger.ready = {"demo-0": replica("demo-0", engine.url)}
        call = asyncio.create_task(rig.chat())
        await wait_until(lambda: rig.served.room.waiting == 1)
        rig.change(replica("demo-0", engine.url))
        answer = await asyncio.wait_for(call, PATIENCE_S)
        assert answer.status_code == 200
        await wait_until(rig.idle)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("where", ["prompt", "first", "usual", "several"])
async def test_token_ids_that_are_none(
    odd: int, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The stream goes on with all of its text; only another replica could not go on with it."""
    sent = [
        event("a", *([odd] if where == "first" else [1]), prompt_token_ids=[1, odd, 2]),
        event("b", *([odd] if where == "usual" else [2])),
        event("c", *([3, odd, 4] if where == "several" else [3])),
        event("d", 5, finish="stop"),
    ]
    if where != "prompt":
        sent[0] = sent[0].replace(b"[1,%d,2]" % odd, b"[1,2]")

    async def tell(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        for one in sent:
            await exchanged.chunk(one)
            await asyncio.sleep(0.01)  # a read for each
        await exchanged.end_stream()

    async with Engine(tell) as first, Engine(tell) as second, Rig(first, second) as rig:
        answer = await asyncio.wait_for(rig.chat(stream=True, temperature=0), PATIENCE_S)
        assert first.seen[0].json["return_token_ids"] if first.seen else second.seen
        events = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
        assert "".join(each["choices"][0]["delta"]["content"] for each in events) == "abcd"
        assert all(not each["choices"][0]["token_ids"] for each in events)
        assert answer.text.endswith("data: [DONE]\n\n")
        assert len(first.seen) + len(second.seen) == 1
        await wait_until(rig.idle)
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("odd", ODD)
def test_a_tape_with_odd_ids_counts_and_goes_no_further(odd: int) -> None:
    """An id that is none counts as a token, cannot be gone on from, and fits a journal."""
    tape = Tape(Options())
    for one in (event("a", 1, prompt_token_ids=[7]), event("b", odd), event("c", 3)):
        assert tape.feed(one), tape.error
    assert (len(tape.ids), tape.chars, tape.refusal) == (3, 3, ODD_IDS)
    again = Tape.recall(
        Options(), [msgspec.json.decode(msgspec.json.encode(tape.memo()), type=Memo)]
    )
    assert (again.ids, again.refusal) == (tape.ids, ODD_IDS)


@pytest.mark.parametrize("odd", ODD)
def test_a_journal_with_odd_ids_does_not_parse(odd: int) -> None:
    """What somebody else has written into a journal is no memo."""
    memo = {"kept": 0, "ids": [1, odd], "chars": 1, "marks": [[0, 0]]}
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(json.dumps(memo), type=Memo)


ODD_CHOICES: dict[str, dict[str, Any]] = {
    "an odd id": {"delta": {"content": "c"}, "token_ids": [1 << 32]},
    "ids that are no numbers": {"delta": {"content": "c"}, "token_ids": ["x"]},
    "ids that are no list": {"delta": {"content": "c"}, "token_ids": 7},
    "log probabilities that are no list": {"delta": {}, "logprobs": {"content": 5}},
    "offsets that are too few": {"text": "c", "logprobs": {"tokens": ["c"], "text_offset": []}},
    "tokens that are numbers": {"text": "c", "logprobs": {"tokens": [1], "text_offset": [0]}},
}


@pytest.mark.parametrize("kind", ODD_CHOICES)
def test_a_continuation_of_another_shape(kind: str) -> None:
    """Whatever the second replica sends, it is passed on, or the replica is left for another."""
    tape = Tape(Options())
    tape.feed(event("a", 1, prompt_token_ids=[7]) + event("b", 2))
    tape.splice(going_on(tape, logprobs=True).seam)
    chunk = {"id": "c", "choices": [{"index": 0, "finish_reason": None, **ODD_CHOICES[kind]}]}
    out = tape.feed(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    assert bool(out) != bool(tape.error)
    assert bool(out) == (tape.refusal == ODD_IDS)


@pytest.mark.parametrize("usage", [5, {"completion_tokens": "x"}, {"completion_tokens": [1]}])
def test_a_continuation_whose_usage_makes_no_sense(usage: object) -> None:
    """It is left for another replica, which tells the usage well."""
    tape = Tape(Options())
    tape.feed(event("a", 1, prompt_token_ids=[7]) + event("b", 2))
    tape.splice(going_on(tape).seam)
    tape.feed(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
    assert bool(tape.error) == isinstance(usage, dict)


def test_log_probabilities_of_another_shape() -> None:
    """Those of a completion that asked for them are read: such a chunk does not parse."""
    tape = Tape(Options(offsets=True))
    odd = {"index": 0, "text": "a", "token_ids": [1], "logprobs": {"tokens": 5}}
    tape.feed(b"data: " + json.dumps({"id": "c", "choices": [odd]}).encode() + b"\n\n")
    assert "does not parse" in tape.error


@pytest.mark.parametrize("fields", [{"id": 5}, {"created": 1.5}, {"model": None}])
def test_a_stream_that_does_not_say_which_it_is(fields: dict[str, Any]) -> None:
    """It is passed on and ends well; nobody else could go on as the same stream."""
    tape = Tape(Options())
    assert tape.feed(event("a", 1, prompt_token_ids=[7], **fields))
    assert "which stream" in tape.refusal
    assert tape.memo().identity is not None
