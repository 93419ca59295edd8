"""Replicas that answer what no engine should: no request hangs, and no two answers are mixed."""

import asyncio

import pytest

from shared.registry.ledger import MAX_CANDIDATES, Adopt
from tests.support.waiting import wait_until
from tests.unit.proxy.engine import Engine, Exchanged
from tests.unit.proxy.rig import Rig, replica

PATIENCE_S = 5.0


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


async def test_more_strangers_than_can_be_excluded() -> None:
    """However many unknown replicas the ledger offers, a request is soon sent by the table."""
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
