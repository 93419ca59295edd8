"""Resumable streams on real processes: proxies killed, frozen and told to end, Redis restarted.

Two proxies share a Redis that keeps its data and two simulated engines with the same weights; a
client that loses its stream goes to the other proxy. Each test prints what it measured.
"""

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
import pytest

from shared.registry import open_registry
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.answers import read, same
from tests.support.servers import RedisServer, any_binary
from tests.support.standalone import ProxyProcess, declare, proxy, running_requests, simengine
from tests.support.waiting import wait_until

MODEL: Final = "sim"
CHAT: Final = "/v1/chat/completions"
STEP: Final = ("--step-ms", "40", "--decode-us-per-seq", "0", "--mean-answer-tokens", "0")
TOKENS: Final = 120
LEASE_S: Final = 4.0
NUMBER: Final = re.compile(rb"(?m)^id: \d+\n")
PLACES: Final = (0, 1, 5, 17, None)
"""Events that clients say to have seen; None: all that they did."""

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(120)]


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """Run a Redis that keeps its data."""
    kept = ("--appendonly", "yes", "--appendfsync", "always")
    server = RedisServer(any_binary(), tmp_path / "redis", *kept)
    yield server
    server.kill()


class Site(NamedTuple):
    """Two proxies before two engines."""

    first: ProxyProcess
    second: ProxyProcess
    engines: list[str]

    async def running(self) -> int:
        """Count the requests that the engines run."""
        return round(sum([await running_requests(url) for url in self.engines]))


@contextlib.asynccontextmanager
async def site(redis_url: str, folder: Path, **settings: float) -> AsyncGenerator[Site]:
    """Run the proxies."""
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(simengine(MODEL, *STEP)) for _ in range(2)]
        registry = await open_registry(CommonSettings(redis_url=Secret(redis_url)))
        stack.push_async_callback(registry.aclose)
        await declare(registry, MODEL, engines)
        proxies = [
            await stack.enter_async_context(
                proxy(
                    redis_url,
                    prefix=(),
                    log=str(folder / f"proxy-{number}.log"),
                    workers=1,
                    **settings,
                )
            )
            for number in range(2)
        ]
        for each in proxies:
            await wait_until(lambda each=each: each.serves(MODEL), timeout_s=60, what="it serves")
        yield Site(proxies[0], proxies[1], engines)


def request(number: int, **fields: object) -> dict[str, Any]:
    """Make one of several greedy requests."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"Tell me of river {number}, résumé and 東京"}],
        "stream": True,
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream_options": {"include_usage": True},
        **fields,
    }


async def undisturbed(site: Site, number: int) -> bytes:
    """Get the whole answer, from the proxy that stays."""
    async with httpx.AsyncClient(base_url=site.second.url, timeout=60) as http:
        return (await http.post(CHAT, json=request(number))).content


class Reading:
    """One client: what it has, of which stream."""

    def __init__(self) -> None:
        self.stream = ""
        self.body = b""

    @property
    def events(self) -> int:
        """Whole events received."""
        return self.body.count(b"\n\n")

    def up_to(self, number: int) -> bytes:
        """Cut after event `number`."""
        return b"".join(event + b"\n\n" for event in self.body.split(b"\n\n")[:number])

    async def ask(self, site: Site, number: int) -> None:
        """Begin a resumable stream, and read it until it breaks."""
        headers = {"x-redmesh-resumable": "1", "authorization": "Bearer mine"}
        await self._read(site.first, "POST", CHAT, headers, request(number))

    async def resume(self, where: ProxyProcess, seen: int) -> None:
        """Resume it after event `seen`, and read it to its end."""
        self.body = self.up_to(seen)
        headers = {"last-event-id": str(seen), "authorization": "Bearer mine"}
        await self._read(where, "GET", f"/v1/streams/{self.stream}", headers, None)

    async def _read(
        self,
        where: ProxyProcess,
        method: str,
        path: str,
        headers: dict[str, str],
        body: Any,  # noqa: ANN401 - JSON
    ) -> None:
        with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
            async with (
                httpx.AsyncClient(base_url=where.url, timeout=60) as http,
                http.stream(method, path, headers=headers, json=body) as answer,
            ):
                assert answer.status_code == 200
                self.stream = answer.headers["x-redmesh-stream"]
                async for data in answer.aiter_raw():
                    self.body += data


@contextlib.asynccontextmanager
async def streaming(site: Site, count: int) -> AsyncGenerator[list[Reading]]:
    """Have some resumable streams under way at the first proxy."""
    readings = [Reading() for _ in range(count)]
    tasks = [
        asyncio.create_task(reading.ask(site, number)) for number, reading in enumerate(readings)
    ]
    await wait_until(lambda: all(reading.events > 20 for reading in readings), timeout_s=30)
    yield readings
    await asyncio.wait_for(asyncio.gather(*tasks), 30)


def judge(reading: Reading, wanted: bytes) -> None:
    """Compare what a client has with the undisturbed answer."""
    plain = NUMBER.sub(b"", reading.body)
    same(read(plain), read(wanted))
    numbers = [int(line[4:]) for line in NUMBER.findall(reading.body)]
    assert numbers == list(range(1, len(numbers) + 1))


async def test_a_killed_proxy_s_streams_go_on_at_another(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """SIGKILL: resumed elsewhere from any event, each answer is what it would have been."""
    async with site(redis_server.url, tmp_path) as here:
        numbers = range(len(PLACES))
        wanted = await asyncio.gather(*(undisturbed(here, number) for number in numbers))
        async with streaming(here, len(PLACES)) as readings:
            os.kill(here.first.pid, signal.SIGKILL)
            killed_s = time.monotonic()
        before = [reading.body for reading in readings]
        tasks = [
            asyncio.create_task(
                reading.resume(here.second, reading.events if seen is None else seen)
            )
            for reading, seen in zip(readings, PLACES, strict=True)
        ]
        await wait_until(
            lambda: all(
                len(reading.body) > len(body)
                for reading, body in zip(readings, before, strict=True)
            ),
            timeout_s=30,
            what="they go on",
        )
        gone_on_s = time.monotonic() - killed_s
        await asyncio.gather(*tasks)
        for reading, body, answer in zip(readings, before, wanted, strict=True):
            assert reading.body.startswith(body), "what was shown stays as it was"
            judge(reading, answer)
        async with httpx.AsyncClient(base_url=here.second.url, timeout=20) as http:
            path = f"/v1/streams/{readings[0].stream}"
            assert (await http.get(path)).status_code == 404, "without the credential"
            again = await http.get(path, headers={"authorization": "Bearer mine"})
            assert again.content == readings[0].body
        print(f"\nkilled proxy: {len(PLACES)} streams went on within {gone_on_s:.2f} s")  # noqa: T201 - figures for the reader
        assert gone_on_s < LEASE_S + 6.0


async def test_a_thawed_proxy_is_refused(redis_server: RedisServer, tmp_path: Path) -> None:
    """SIGSTOP: another proxy goes on; thawed, the first one is refused and tells its engine."""
    async with site(redis_server.url, tmp_path) as here:
        wanted = await undisturbed(here, 0)
        async with streaming(here, 1) as (reading,):
            here.first.process.send_signal(signal.SIGSTOP)
            frozen = Reading()
            frozen.stream, frozen.body = reading.stream, reading.body
            resumed = asyncio.create_task(frozen.resume(here.second, frozen.events))
            seen = frozen.events
            await wait_until(lambda: frozen.events > seen + 3, timeout_s=30, what="it goes on")
            here.first.process.send_signal(signal.SIGCONT)
            thawed_s = time.monotonic()

            async def let_go() -> bool:
                return await here.first.in_flight(MODEL) == 0

            await wait_until(let_go, timeout_s=20, what="the first proxy lets go")
            refused_s = time.monotonic() - thawed_s
        await resumed
        judge(frozen, wanted)
        shown = reading.body
        assert frozen.body.startswith(shown), "the thawed proxy showed nothing of its own"
        log = (tmp_path / "proxy-0.log").read_text()
        assert "journal_refused" in log
        print(f"\nthawed proxy: refused after {refused_s:.2f} s")  # noqa: T201 - figures for the reader


async def test_a_proxy_that_ends_hands_over(redis_server: RedisServer, tmp_path: Path) -> None:
    """SIGTERM: what does not finish in the time of grace goes on elsewhere at once."""
    times = {"drain_delay_s": 0.1, "drain_timeout_s": 1.0}
    async with site(redis_server.url, tmp_path, **times) as here:
        wanted = await undisturbed(here, 0)
        async with streaming(here, 1) as (reading,):
            here.first.terminate()
            assert await here.first.ended() == 0
        shown, ended_s = reading.body, time.monotonic()
        assert b"error" not in shown
        resumed = asyncio.create_task(reading.resume(here.second, reading.events))
        await wait_until(lambda: len(reading.body) > len(shown), timeout_s=30, what="it goes on")
        gone_on_s = time.monotonic() - ended_s
        await resumed
        judge(reading, wanted)
        print(f"\nended proxy: its stream went on within {gone_on_s:.2f} s")  # noqa: T201 - figures for the reader


async def test_redis_restarts_under_a_stream(redis_server: RedisServer, tmp_path: Path) -> None:
    """Clients of both proxies get everything; the generation stays the one that it was."""
    async with site(redis_server.url, tmp_path) as here:
        wanted = await undisturbed(here, 0)
        async with streaming(here, 1) as (reading,):
            other = Reading()
            other.stream = reading.stream
            following = asyncio.create_task(other.resume(here.second, 0))
            await wait_until(lambda: other.events > 20, timeout_s=20, what="it follows")
            await asyncio.to_thread(redis_server.kill)
            before = reading.events
            await wait_until(
                lambda: reading.events > before + 10, timeout_s=20, what="the client is served"
            )
            assert await here.running() == 1
            await asyncio.to_thread(redis_server.start)
        await following
        judge(reading, wanted)
        assert other.body == reading.body


async def test_a_stream_expires(redis_server: RedisServer, tmp_path: Path) -> None:
    """After its time nothing is left of it in Redis, and it is unknown."""
    async with site(redis_server.url, tmp_path, resumable_life_s=0.5) as here:
        reading = Reading()
        await reading.ask(here, 0)
        await wait_until(
            lambda: not redis_server.command("KEYS", f"*{reading.stream}*"), what="it expires"
        )
        async with httpx.AsyncClient(base_url=here.second.url) as http:
            mine = {"authorization": "Bearer mine"}
            answer = await http.get(f"/v1/streams/{reading.stream}", headers=mine)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "stream_not_found")
