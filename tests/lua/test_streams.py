"""The journals of resumable streams: one writer at a time, no gap, no event twice, an end."""

import asyncio

from shared.registry import Registry
from shared.registry.streams import Append, Claimed, StreamState
from tests.lua.exercise import ASKED, STREAM, writer


def events(first: int, last: int) -> Append:
    """Make events with these numbers."""
    text = b"".join(b"id: %d\n\n" % number for number in range(first, last + 1))
    return Append(first=first, last=last, events=text, tape=b'{"chars":%d}' % last)


async def test_a_journal_from_beginning_to_end(door: Registry) -> None:
    """What was appended is read in order from anywhere, and the request is known."""
    streams = door.streams
    assert await streams.known(STREAM) is None
    assert await streams.read(STREAM, 0) is None
    assert await streams.open(STREAM, writer(), ASKED)
    assert (await streams.append(STREAM, writer(), events(1, 2))).idle_ms == -1
    page = await streams.read(STREAM, 0)
    assert page is not None
    assert 0 < page.lease_left_ms <= 4000
    assert page[:3] == (StreamState.LIVE, 1, 2)
    assert 0 <= (await streams.append(STREAM, writer(), events(3, 3))).idle_ms < 1000
    done = await streams.append(STREAM, writer(), events(4, 9), StreamState.DONE)
    assert done.status == "OK"
    page = await streams.read(STREAM, 2)
    assert page is not None
    assert (page.state, page.last) == (StreamState.DONE, 9)
    assert page.appends == [(3, events(3, 3).events), (4, events(4, 9).events)]
    page = await streams.read(STREAM, 5)
    assert page is not None
    assert [first for first, _ in page.appends] == [4]
    page = await streams.read(STREAM, 0, 1)
    assert page is not None
    assert [first for first, _ in page.appends] == [1]
    known = await streams.known(STREAM)
    assert known is not None
    assert (known.asked, known.state) == (ASKED, StreamState.DONE)
    assert (await streams.append(STREAM, writer(), Append())).status == "ENDED"


async def test_an_append_is_added_once_and_without_a_gap(door: Registry) -> None:
    """A repeat adds nothing; what does not follow is refused; nothing revives what is not there."""
    streams = door.streams
    assert (await streams.append(STREAM, writer(), events(1, 2))).status == "ABSENT"
    assert await streams.known(STREAM) is None
    await streams.open(STREAM, writer(), ASKED)
    for _ in range(2):
        assert (await streams.append(STREAM, writer(), events(1, 2))).status == "OK"
    assert (await streams.append(STREAM, writer(), events(4, 5))).status == "GAP"
    page = await streams.read(STREAM, 0)
    assert page is not None
    assert page.appends == [(1, events(1, 2).events)]
    assert await streams.open(STREAM, writer(), ASKED), "a repeat of the beginning"
    assert not await streams.open(STREAM, writer("p2"), ASKED), "an id that is in use"


async def test_one_claimant_when_the_lease_is_over(door: Registry) -> None:
    """No claim while the writer lives; then one of many; the former writer is refused."""
    streams = door.streams
    await streams.open(STREAM, writer(), ASKED)
    await streams.append(STREAM, writer(), events(1, 2))
    assert await streams.claim(STREAM, writer("p2")) is None
    await streams.append(STREAM, writer(lease_ms=0), events(3, 4))
    claims = [streams.claim(STREAM, writer(f"p{number}")) for number in range(2, 9)]
    won = [claim for claim in await asyncio.gather(*claims) if claim is not None]
    tapes = [events(1, 2).tape, events(3, 4).tape]
    size = len(ASKED.body) + sum(len(e.events) + len(e.tape) for e in (events(1, 2), events(3, 4)))
    assert won == [Claimed(2, size, 4, tapes, whole=True)]
    assert (await streams.append(STREAM, writer(), events(5, 5))).status == "FENCED"
    page = await streams.read(STREAM, 0)
    assert page is not None
    assert (page.epoch, page.last) == (2, 4)
    assert page.lease_left_ms > 0
    assert await streams.claim(STREAM, writer("p9", 2)) is None


async def test_a_claim_whose_reply_was_lost(door: Registry) -> None:
    """The same proxy that claims again gets the same answer, and nobody else gets any."""
    streams = door.streams
    await streams.open(STREAM, writer(lease_ms=0), ASKED)
    first = await streams.claim(STREAM, writer("p2"))
    assert first is not None
    assert await streams.claim(STREAM, writer("p2")) == first
    assert await streams.claim(STREAM, writer("p3")) is None


async def test_a_clock_that_jumped_does_not_hold_a_stream(door: Registry) -> None:
    """A lease that would last for hours counts as over."""
    streams = door.streams
    await streams.open(STREAM, writer(lease_ms=3_600_000), ASKED)
    assert await streams.claim(STREAM, writer("p2")) is not None


async def test_a_journal_with_a_part_missing_is_seen(door: Registry) -> None:
    """A claimant learns that appends were lost."""
    streams = door.streams
    await streams.open(STREAM, writer(), ASKED)
    for number in (1, 2, 3):
        await streams.append(STREAM, writer(lease_ms=0), events(number, number))
    for lost in ("2-0", "3-0"):
        await door.connection.command("XDEL", door.keys.stream(STREAM).tokens, lost)
        claimed = await streams.claim(STREAM, writer("p2"))
        assert claimed is not None
        assert not claimed.whole


async def test_a_closed_stream_is_over(door: Registry) -> None:
    """Its content is gone at once, its writer learns it, and nobody can claim it."""
    streams = door.streams
    await streams.close(STREAM, StreamState.LOST)
    assert await streams.known(STREAM) is None
    await streams.open(STREAM, writer(lease_ms=0), ASKED)
    await streams.append(STREAM, writer(lease_ms=0), events(1, 2))
    for _ in range(2):
        await streams.close(STREAM, StreamState.CANCELLED)
        page = await streams.read(STREAM, 0)
        assert page is not None
        assert (page.state, page.appends) == (StreamState.CANCELLED, [])
    assert (await streams.append(STREAM, writer(), events(3, 4))).status == "ENDED"
    assert await streams.claim(STREAM, writer("p2")) is None


async def test_a_former_writer_closes_nothing(door: Registry) -> None:
    """A journal is given up by its present writer only, and cancelled by its owner at any time."""
    streams = door.streams
    await streams.open(STREAM, writer(lease_ms=0), ASKED)
    await streams.append(STREAM, writer(lease_ms=0), events(1, 2))
    assert await streams.claim(STREAM, writer("p2")) is not None
    for stale in (writer(), writer("p1", 2), writer("p2", 1)):
        assert not await streams.close(STREAM, StreamState.LOST, stale)
        page = await streams.read(STREAM, 0)
        assert page is not None
        assert (page.state, page.appends) == (StreamState.LIVE, [(1, events(1, 2).events)])
    for _ in range(2):
        assert await streams.close(STREAM, StreamState.LOST, writer("p2", 2))
    page = await streams.read(STREAM, 0)
    assert page is not None
    assert (page.state, page.appends) == (StreamState.LOST, [])
    assert await streams.close(STREAM, StreamState.CANCELLED)


async def test_foreign_records_are_no_streams(door: Registry) -> None:
    """A record that does not parse is as if it were not there."""
    keys = door.keys.stream(STREAM)
    await door.connection.command("HSET", keys.meta, "writer", "p1", "state", "odd")
    await door.connection.command("PEXPIRE", keys.meta, 60_000)
    assert await door.streams.known(STREAM) is None
    assert await door.streams.read(STREAM, 0) is None
