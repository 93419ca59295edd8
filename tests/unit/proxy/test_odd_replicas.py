"""Replicas that answer what no engine should: no request hangs, and no two answers are mixed."""

import asyncio

import pytest

from tests.support.waiting import wait_until
from tests.unit.proxy.engine import Engine, Exchanged
from tests.unit.proxy.rig import Rig

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
