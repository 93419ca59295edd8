"""Streams that can be resumed: on any proxy, after any end of client or proxy, without a flaw.

The proxies share simulated engines in the test's own loop and a Redis in memory.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from services.proxy.resume import room, writing
from services.proxy.resume.events import after, event_number, numbered
from shared.errors import RegistryUnavailableError
from shared.models.deployment import StreamFailover
from shared.registry.streams import Append, Appended, Streams, StreamState, Writer
from tests.support.answers import blank, read, same
from tests.support.waiting import wait_until
from tests.unit.proxy.engine import Engine, Exchanged
from tests.unit.proxy.resumption import RESUMABLE, Got, ask, die, journals, resume, up_to, written
from tests.unit.proxy.rig import MODEL, Rig, chat
from tests.unit.proxy.test_stream_failover import (
    CHAT,
    COMPLETIONS,
    Sim,
    failovers,
    request,
    sims,
)

USAGE = {"stream_options": {"include_usage": True}}
SLOW = ("--step-ms", "15")


@pytest.fixture(autouse=True)
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make everything that is waited for shorter."""
    monkeypatch.setattr(room, "LEASE_S", 0.6)
    monkeypatch.setattr(writing, "RENEW_S", 0.1)


@contextlib.asynccontextmanager
async def site(*flags: str, **settings: float) -> AsyncGenerator[tuple[list[Sim], Rig, Rig]]:
    """Run two engines and two proxies before them that share their journals."""
    async with contextlib.AsyncExitStack() as stack:
        engines = await stack.enter_async_context(sims(2, *flags))
        shared = await stack.enter_async_context(journals())
        proxies: list[Rig] = []
        for _ in range(2):
            rig = Rig(*engines, spec=None, **settings)
            rig.journals = shared
            proxies.append(await stack.enter_async_context(rig))
        yield engines, proxies[0], proxies[1]


def requests(*rigs: Rig) -> int:
    """Count the requests that engines got from these proxies."""
    return sum(len(rig.ledger.reserves()) for rig in rigs)


def test_events_get_numbers_and_are_found_by_them() -> None:
    """Numbers follow each other; what was seen is left out, also from the middle of an append."""
    body, last = numbered(b"data: a\n\ndata: b\n\n", 4)
    assert (body, last) == (b"id: 5\ndata: a\n\nid: 6\ndata: b\n\n", 6)
    assert after(body, 5, 0) == (body, 6)
    assert after(body, 5, 4) == (body, 6)
    assert after(body, 5, 5) == (b"id: 6\ndata: b\n\n", 6)
    assert after(body, 5, 6) == (b"", 6)
    assert after(body, 5, 9) == (b"", 9)
    given = (b"0", b"12", b"-1", b"x", b"1" * 16, b"\xd9\xa1")
    assert [event_number(one) for one in given] == [0, 12, None, None, None, None]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, f"/v1/chat/{MODEL}"])
async def test_a_resumable_stream_is_the_same_with_numbers(path: str) -> None:
    """With the header each event has its number from 1, and nothing else changes."""
    async with site() as (_, rig, _other):
        asked = request(CHAT if path.startswith("/v1/chat") else path, **USAGE)
        wanted = blank((await rig.http.post(path, json=asked)).content)
        got = await ask(rig, path, asked)
        assert blank(got.plain) == wanted
        assert got.numbers == list(range(1, len(wanted)))
        assert len(got.stream) == 32
        await wait_until(rig.idle)
        assert len(rig.room) == 0


async def test_events_come_as_they_are_journaled() -> None:
    """A client is shown no event that the journal lacks, and gets them flush by flush."""
    async with site(*SLOW) as (_, rig, _other):
        got = await ask(rig, CHAT, request(CHAT, max_tokens=60), events=8)
        page = await rig.journals.read(got.stream, 0)
        assert page is not None
        assert page.last >= 8
        assert page.state is StreamState.LIVE
        assert 2 <= len(page.appends) <= page.last
        await resume(rig, got.stream)
        late = await rig.journals.read(got.stream, 40)
        assert late is not None
        assert len(late.appends) < late.last - 40


async def test_a_client_comes_back_to_the_same_generation() -> None:
    """Gone and back, on either proxy, a client gets what was missing of one generation."""
    async with site(*SLOW) as (_, first, second):
        asked = request(CHAT, max_tokens=60, **USAGE)
        got = await ask(first, CHAT, asked, events=5)
        seen = 5
        body = got.body
        for rig in (second, first, second):
            part = await resume(rig, got.stream, seen, events=9)
            body, seen = body + part.body, seen + 9
        body += (await resume(first, got.stream, seen)).body
        assert requests(first, second) == 1
        wanted = await resume(second, got.stream)
        assert body == wanted.body
        assert wanted.numbers == list(range(1, len(wanted.numbers) + 1))
        same(read(wanted.plain), read((await first.http.post(CHAT, json=asked)).content))


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, USAGE),
    "completion": (COMPLETIONS, {"logprobs": 2, "max_tokens": 30}),
    "seed": (CHAT, {"temperature": 0.8, "seed": 7}),
    "ids": (CHAT, {"return_token_ids": True}),
    "stop": (COMPLETIONS, {"stop": ["never said by anyone"], **USAGE}),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_dead_proxy_s_stream_goes_on_elsewhere(kind: str) -> None:
    """Wherever its proxy dies, a stream goes on at another one as if nothing had happened."""
    path, fields = KINDS[kind]
    asked = request(path, **{"max_tokens": 60, **fields})
    async with site(*SLOW) as (_, first, second):
        wanted = read((await first.http.post(path, json=asked)).content)
        for events in (1, 7, 20):
            got = await ask(first, path, asked, events=events)
            await die(first)
            seen = min(events, 4)
            rest = await resume(second, got.stream, seen)
            whole = up_to(got.body, seen) + rest.body
            assert whole.startswith(got.body)
            assert Got("", whole).numbers == list(range(1, len(rest.numbers) + seen + 1))
            same(read(Got("", whole).plain), wanted)
            again = await resume(first, got.stream)
            assert again.body == whole
        await wait_until(lambda: first.idle() and second.idle())


async def test_many_readers_of_a_dead_proxy_s_stream() -> None:
    """Whoever resumes it, where and as often they like: one goes on with it, all get the same."""
    asked = request(CHAT, max_tokens=60)
    async with site(*SLOW) as (_, first, second):
        got = await ask(first, CHAT, asked, events=6)
        await die(first)
        tasks = [resume(rig, got.stream, seen) for rig in (first, second) for seen in (0, 3, 6)]
        parts = await asyncio.gather(*tasks)
        assert parts[0].body == parts[3].body
        for part, seen in zip(parts, (0, 3, 6) * 2, strict=True):
            assert up_to(parts[0].body, seen) + part.body == parts[0].body
        assert requests(first, second) == 2
        same(read(parts[0].plain), read((await first.http.post(CHAT, json=asked)).content))


async def test_a_stream_survives_one_proxy_after_another() -> None:
    """It is taken over again and again, without end, and it is still the same stream."""
    asked = request(CHAT, max_tokens=80, **USAGE)
    async with site(*SLOW) as (_, first, second):
        wanted = read((await first.http.post(CHAT, json=asked)).content)
        body = (got := await ask(first, CHAT, asked, events=6)).body
        writer = first
        for reader in (second, first, second, first, second):
            await die(writer)
            seen = body.count(b"\n\n")
            body += (await resume(reader, got.stream, seen, events=6)).body
            writer = reader
        body += (await resume(first, got.stream, body.count(b"\n\n"))).body
        same(read(Got("", body).plain), wanted)


async def test_lost_replicas_count_whoever_writes() -> None:
    """A stream that has lost its replica three times goes on no more, at another proxy either."""
    asked = request(CHAT, max_tokens=200)
    async with site(*SLOW) as (engines, first, second):
        wanted = read((await first.http.post(CHAT, json=asked)).content)
        for engine, tokens in zip(engines, (7, 9), strict=True):
            await engine.cut(tokens)
        got = await ask(first, CHAT, asked, events=20)
        assert failovers(first, "exact") == 2
        await die(first)
        for engine in engines:
            await engine.cut(3, count=2)
        whole = await resume(second, got.stream)
        assert whole.body.startswith(got.body)
        broken = read(whole.plain)
        assert "3 times" in broken.errors[0]["message"]
        assert wanted.text.startswith(broken.text)
        # To be taken over is none of the three: it went on once more before it was refused.
        assert failovers(second, "exact") == 2


async def test_a_sampled_stream_never_shows_two_answers() -> None:
    """Without a seed it goes on with another sample: what was shown stays a part of it."""
    asked = request(CHAT, temperature=0.9, max_tokens=60, **USAGE)
    async with site(*SLOW) as (_, first, second):
        got = await ask(first, CHAT, asked, events=20)
        await die(first)
        whole = await resume(second, got.stream)
        assert whole.body.startswith(got.body)
        answer = read(whole.plain)
        assert (answer.errors, answer.done, answer.usage["completion_tokens"]) == ([], True, 60)


async def test_what_cannot_go_on_ends_with_an_error() -> None:
    """A stream that only its own proxy could finish ends as an error that every reader sees."""
    spec = {"stream_failover": StreamFailover.EXACT}
    async with sims(2, *SLOW) as engines, journals() as shared, Rig(*engines, spec=spec) as rig:
        rig.room.streams = shared
        got = await ask(rig, CHAT, request(CHAT, temperature=0.9, max_tokens=60), events=6)
        await die(rig)
        for _ in range(2):
            answer = read((await resume(rig, got.stream)).plain)
            assert "only exact streams" in answer.errors[0]["message"]


async def test_nobody_reads_it() -> None:
    """Left alone it stops after its time, and goes on from there for whoever comes back."""
    asked = request(CHAT, max_tokens=200)
    async with site(*SLOW, resumable_orphan_s=0.3) as (_, first, second):
        got = await ask(first, CHAT, asked, events=6)
        await wait_until(first.idle)
        assert len(first.room) == 0
        page = await first.journals.read(got.stream, 0)
        assert page is not None
        assert page.state is StreamState.LIVE
        assert page.last < 150
        rest = await resume(second, got.stream, 6)
        same(
            read(Got("", got.body + rest.body).plain),
            read((await first.http.post(CHAT, json=asked)).content),
        )


async def test_a_reader_elsewhere_keeps_it_alive() -> None:
    """As long as anybody reads it, on whatever proxy, it is generated on."""
    async with site(*SLOW, resumable_orphan_s=1.5) as (_, first, second):
        got = await ask(first, CHAT, request(CHAT, max_tokens=240), events=6)
        answer = read((await resume(second, got.stream)).plain)
        assert answer.done
        assert requests(first, second) == 1


async def test_a_proxy_that_ends_hands_its_streams_over() -> None:
    """An orderly end gives the lease up: another proxy goes on at once."""
    asked = request(CHAT, max_tokens=60)
    async with site(*SLOW) as (_, first, second):
        got = await ask(first, CHAT, asked, events=6)
        await first.room.aclose()
        page = await second.journals.read(got.stream, 0)
        assert page is not None
        assert page.lease_left_ms == 0
        rest = await resume(second, got.stream, 6)
        same(
            read(Got("", got.body + rest.body).plain),
            read((await first.http.post(CHAT, json=asked)).content),
        )


class Troubled:
    """Journals of a proxy that is frozen, or whose Redis is away, when the test wants that."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.flows = asyncio.Event()
        self.flows.set()
        self.away = False

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - an act of the registry's room
        if self.away:
            raise RegistryUnavailableError("away")
        return getattr(self._streams, name)

    async def append(
        self, stream: str, writer: Writer, append: Append, state: StreamState = StreamState.LIVE
    ) -> Appended:
        """Append when it may."""
        if self.away:
            raise RegistryUnavailableError("away")
        await self.flows.wait()
        return await self._streams.append(stream, writer, append, state)


async def test_a_thawed_writer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that slept while another took its stream over is refused, and stops."""
    monkeypatch.setattr(writing, "DEADLINE_S", 30)
    asked = request(CHAT, max_tokens=150)
    async with site(*SLOW) as (_, first, second):
        first.room.streams = troubled = Troubled(first.journals)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType] - a proxy of it
        got = await ask(first, CHAT, asked, events=6)
        troubled.flows.clear()
        rest = await resume(second, got.stream, 6, events=10)
        assert first.fleet.in_flight() == 1
        troubled.flows.set()
        await wait_until(first.idle)
        assert len(first.room) == 0
        body = got.body + rest.body
        body += (await resume(second, got.stream, 16)).body
        same(read(Got("", body).plain), read((await first.http.post(CHAT, json=asked)).content))


@pytest.mark.parametrize("temperature", [0, 0.9])
async def test_a_former_writer_that_gives_up_harms_no_successor(
    monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """A proxy that was cut off while another took its stream over cannot end that one's journal."""
    asked = request(CHAT, max_tokens=150, temperature=temperature)
    async with site(*SLOW) as (_, first, second):
        first.room.streams = troubled = Troubled(first.journals)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType] - a proxy of it
        begun = asyncio.create_task(ask(first, CHAT, asked))
        await wait_until(lambda: written(first) and written(first)[0].journal.collected > 5)
        (former,) = written(first)
        troubled.away = True
        rest = await resume(second, former.stream, 0, events=16)
        # From now on, whatever it has written is too long for its journal.
        monkeypatch.setattr(former, "_limits", writing.Limits(size_bytes=0, orphan_s=60))
        troubled.away = False
        with pytest.raises(httpx.HTTPError):  # its client is told to come again
            await begun
        await wait_until(first.idle)
        whole = await resume(second, former.stream)
        assert whole.body.startswith(rest.body)
        answer = read(whole.plain)
        assert (answer.errors, answer.done) == ([], True)


async def test_redis_is_away_for_a_while() -> None:
    """The client gets its events without it; when it is back, the journal has them too."""
    asked = request(CHAT, max_tokens=100)
    async with site(*SLOW) as (_, rig, other):
        rig.room.streams = troubled = Troubled(rig.journals)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType] - a proxy of it

        async def away() -> None:
            await wait_until(lambda: len(rig.room) == 1)
            (task,) = written(rig)
            await wait_until(lambda: task.journal.last > 10)
            troubled.away = True
            await wait_until(lambda: task.journal.last > 60)
            troubled.away = False

        got, _ = await asyncio.gather(ask(rig, CHAT, asked), away())
        await wait_until(lambda: len(rig.room) == 0)
        assert (await resume(other, got.stream)).body == got.body
        assert requests(rig, other) == 1


async def test_redis_is_away_at_the_beginning() -> None:
    """Without Redis a stream is answered all the same, and promises nothing."""
    asked = request(CHAT)
    async with sims(1) as (engine,), Rig(engine) as rig:
        answer = await rig.http.post(CHAT, json=asked, headers=RESUMABLE)
        assert "x-redmesh-stream" not in answer.headers
        same(read(answer.content), read((await rig.http.post(CHAT, json=asked)).content))
        assert b"id: " not in answer.content
        lost = await rig.http.get("/v1/streams/" + "0" * 32)
        assert (lost.status_code, lost.json()["error"]["code"]) == (503, "journal_unavailable")


async def test_redis_comes_back_empty() -> None:
    """A journal that was lost ends no stream; the client gets all, and nobody resumes it."""
    async with site(*SLOW) as (_, rig, _other):

        async def lose() -> None:
            await wait_until(lambda: len(rig.room) == 1)
            (task,) = written(rig)
            await wait_until(lambda: task.journal.last > 10)
            keys = rig.journals._keys.stream(task.stream)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType] - the real one
            await rig.journals._connection.command("DEL", keys.meta, keys.tokens)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] - the real one

        got, _ = await asyncio.gather(ask(rig, CHAT, request(CHAT, max_tokens=60)), lose())
        assert read(got.plain).done
        assert (await rig.http.get(f"/v1/streams/{got.stream}")).status_code == 404


async def test_a_stream_that_is_too_long_for_its_journal() -> None:
    """Beyond its limit a journal is given up: the client gets the whole stream, Redis is freed."""
    async with site(resumable_bytes=8000) as (_, rig, _other):
        got = await ask(rig, CHAT, request(CHAT, max_tokens=100))
        assert read(got.plain).done
        await wait_until(lambda: len(rig.room) == 0)
        answer = await rig.http.get(f"/v1/streams/{got.stream}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "stream_not_found")


async def test_streams_are_their_caller_s() -> None:
    """With another credential a stream is as unknown as one that never was."""
    async with site() as (_, rig, other):
        got = await ask(rig, CHAT, request(CHAT), authorization="Bearer mine")
        path = f"/v1/streams/{got.stream}"
        never = await other.http.get("/v1/streams/" + "0" * 32)
        for headers in ({}, {"authorization": "Bearer yours"}):
            for method in ("GET", "DELETE"):
                answer = await other.http.request(method, path, headers=headers)
                assert (answer.status_code, answer.content) == (404, never.content)
        mine = await other.http.get(path, headers={"authorization": "Bearer mine"})
        assert mine.content == got.body


async def test_a_stream_is_cancelled() -> None:
    """DELETE ends the generation, wherever it runs, and the stream is gone."""
    for local in (True, False):
        async with site(*SLOW) as (_, first, second):
            rig = first if local else second
            got = await ask(first, CHAT, request(CHAT, max_tokens=400), events=5)
            path = f"/v1/streams/{got.stream}"
            reading = asyncio.create_task(resume(second, got.stream))
            await wait_until(lambda second=second: second.room.readers == 1)
            assert (await rig.http.delete(path)).status_code == 204
            assert b"stream_cancelled" in (await reading).body
            await wait_until(first.idle)
            assert (await second.http.get(path)).status_code == 404


async def test_a_finished_stream_has_no_more() -> None:
    """Resumed after its last event a stream answers 204, which ends an EventSource."""
    async with site() as (_, rig, _other):
        got = await ask(rig, CHAT, request(CHAT))
        last = {"last-event-id": str(got.numbers[-1])}
        answer = await rig.http.get(f"/v1/streams/{got.stream}", headers=last)
        assert (answer.status_code, answer.content) == (204, b"")


async def test_bad_requests_say_what_to_change() -> None:
    """What cannot be resumable, or is no stream or event, is refused with the reason."""
    async with site(max_resumable_streams=0) as (_, rig, _other):
        path = f"/v1/streams/{'0' * 32}"
        cases: list[tuple[Any, int, str, str]] = [
            (("GET", "/v1/streams/x"), 404, "stream_not_found", "not yours"),
            (("GET", "/v1/streams/"), 404, "stream_not_found", "not yours"),
            (("POST", path), 405, "method_not_allowed", "GET, DELETE"),
            (("GET", path, {"last-event-id": "x"}), 400, "invalid_last_event_id", "whole number"),
        ]
        for (method, url, *headers), status, code, words in cases:
            answer = await rig.http.request(method, url, headers=headers[0] if headers else None)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert words in answer.json()["error"]["message"]
        unfit: list[tuple[dict[str, Any], int, str]] = [
            (request(CHAT, stream=False), 400, "set `stream` to true"),
            (request(CHAT, n=2), 400, "several choices"),
            (request(CHAT), 429, "its limit"),
        ]
        for body, status, words in unfit:
            answer = await rig.http.post(CHAT, json=body, headers=RESUMABLE)
            assert answer.status_code == status
            assert words in answer.json()["error"]["message"]
        text = {"content-type": "text/plain", **RESUMABLE}
        answer = await rig.http.post(f"/v1/chat/{MODEL}", content=b"hi", headers=text)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_resumable")
        answer = await rig.http.post(
            CHAT, json=request(CHAT), headers={"x-redmesh-resumable": "perhaps"}
        )
        assert "1 or 0" in answer.json()["error"]["message"]
        plain = await rig.http.post(CHAT, json=request(CHAT), headers={"x-redmesh-resumable": "0"})
        assert b"id: " not in plain.content


async def test_an_event_that_is_not_there_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number beyond the journal is refused, with the one to resume from."""
    monkeypatch.setattr("services.proxy.resume.reading.AHEAD_S", 0.2)
    async with site() as (_, rig, _other):
        got = await ask(rig, CHAT, request(CHAT))
        answer = await rig.http.get(f"/v1/streams/{got.stream}", headers={"last-event-id": "999"})
        assert answer.status_code == 400
        assert f"ends with event {got.numbers[-1]}" in answer.json()["error"]["message"]


async def test_an_engine_s_refusal_passes() -> None:
    """What the engine refuses reaches the client as it is, and leaves nothing behind."""

    async def refuse(exchanged: Exchanged) -> None:
        await exchanged.whole(400, b'{"error":{"message":"no"}}')

    async with Engine(refuse) as engine, journals() as shared, Rig(engine) as rig:
        rig.room.streams = shared
        answer = await rig.http.post(CHAT, json=chat(stream=True), headers=RESUMABLE)
        assert (answer.status_code, answer.content) == (400, b'{"error":{"message":"no"}}')
        assert "x-redmesh-stream" not in answer.headers
        await wait_until(lambda: len(rig.room) == 0)
        assert rig.idle()
