"""The end of a proxy on real processes: told to end it breaks nothing, killed only what it had.

And its likeness: a proxy that stands still for so long that it is given up, and goes on.

One proxy or two share a Redis and two simulated engines; nobody restarts them. Each test prints
what it measured.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.registry import Registry, open_registry
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.mesh import redmesh
from tests.support.servers import RedisServer, any_binary
from tests.support.standalone import ProxyProcess, declare, proxy, running_requests, simengine
from tests.support.streams import Load, Phase, Report
from tests.support.verdicts import Outcome
from tests.support.waiting import wait_until

MODEL = "sim"
STREAMS = 50
"""On the proxy that ends; as many are on the other one."""
TOKENS = 40
STEP_MS = 40
GRACE_S = 8
"""For answers in progress, on SIGTERM."""
DELAY_S = 1.5
"""From failing readiness to closing the port: long enough to look, on a busy machine."""
STREAM_S = TOKENS * STEP_MS / 1000
REAPED_S = 7.0
"""Silent for 5 s, then suspect for 2 s."""
BEAT_S = 1.2
"""At most, with its jitter."""
CLEAN_S = 10.0
"""From the end of a fault until an audit begins that finds nothing."""
FROZEN_TOKENS = 450
"""Of streams that begin before a freeze and end after it: eighteen seconds."""
SLACK_S = 2.5
"""Beats of about a second on either side of it, on a busy machine."""

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(120)]


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """Run a Redis of the test's own."""
    server = RedisServer(any_binary(), tmp_path / "redis")
    yield server
    server.kill()


class Site:
    """Proxies before two engines: the first one ends, the others stay."""

    def __init__(self, registry: Registry, proxies: list[ProxyProcess], engines: list[str]) -> None:
        self.registry = registry
        self.ending, *self.staying = proxies
        self.engines = engines

    def load(self, max_tokens: int = TOKENS) -> Load:
        """Make load for all proxies."""
        ports = [self.ending.port, *(each.port for each in self.staying)]
        return Load(ports, MODEL, max_tokens=max_tokens, patience_s=5)

    @contextlib.asynccontextmanager
    async def long_streams(self, max_tokens: int = 2000) -> AsyncGenerator[Load]:
        """Have 50 streams on their way, which by default take longer than any test."""
        load = self.load(max_tokens=max_tokens)
        async with asyncio.TaskGroup() as group:
            for user in range(STREAMS):
                group.create_task(load.ask(user))
            await wait_until(lambda: load.streaming == STREAMS, timeout_s=20, what="they stream")
            yield load

    async def reserved(self) -> int:
        """Read how many reservations the ledger holds."""
        totals = await self.registry.ledger.totals(MODEL)
        return sum(total.requests for total in totals.values())

    async def on_engines(self) -> int:
        """Read how many requests the engines run, by their own counts."""
        return round(sum([await running_requests(url) for url in self.engines]))


@contextlib.asynccontextmanager
async def running(redis_url: str, folder: Path, proxies: int) -> AsyncGenerator[Site]:
    """Run some proxies, each with eight seconds to end."""
    async with contextlib.AsyncExitStack() as stack:
        step = ("--step-ms", str(STEP_MS), "--decode-us-per-seq", "0")
        engines = [await stack.enter_async_context(simengine(MODEL, *step)) for _ in range(2)]
        registry = await open_registry(CommonSettings(redis_url=Secret(redis_url)))
        stack.push_async_callback(registry.aclose)
        await declare(registry, MODEL, engines)
        logs = [str(folder / f"proxy-{number}.log") for number in range(proxies)]
        started = [
            await stack.enter_async_context(
                proxy(redis_url, log=log, drain_delay_s=DELAY_S, drain_timeout_s=GRACE_S)
            )
            for log in logs
        ]
        for each in started:
            await wait_until(lambda each=each: each.serves(MODEL), timeout_s=60, what="it serves")
        yield Site(registry, started, engines)


@pytest.fixture
async def pair(redis_server: RedisServer, tmp_path: Path) -> AsyncGenerator[Site]:
    """Run two proxies."""
    async with running(redis_server.url, tmp_path, 2) as site:
        yield site


@pytest.fixture
async def alone(redis_server: RedisServer, tmp_path: Path) -> AsyncGenerator[Site]:
    """Run one proxy."""
    async with running(redis_server.url, tmp_path, 1) as site:
        yield site


def told(what: str, report: Report, **figures: float) -> None:
    """Print what was measured."""
    shown = ", ".join(f"{name} {value:.2f} s" for name, value in figures.items())
    print(f"\n{what}: {shown}\n{report}")  # noqa: T201 - figures for the reader


async def test_a_proxy_that_is_told_to_end_breaks_nothing(pair: Site) -> None:
    """SIGTERM amid 50 streams: readiness fails first, every answer is whole, nobody is reset."""
    load = pair.load()
    async with load.users(2 * STREAMS):
        await wait_until(lambda: load.good >= STREAMS, timeout_s=30, what="streams flow")
        async with httpx.AsyncClient(base_url=pair.ending.url) as kept:
            assert (await kept.get("/health/ready")).status_code == 200
            began_s = time.monotonic()
            pair.ending.terminate()

            async def not_ready() -> bool:
                return not await pair.ending.ready()

            await wait_until(not_ready, interval_s=0.005, what="readiness fails")
            unready_s = time.monotonic() - began_s
            answer = await kept.get("/health/ready")
            assert (answer.status_code, answer.json()["reason"]) == (503, "draining")
            assert answer.headers["connection"] == "close"
            assert await pair.ending.get("/health/live", pair.ending.url), "new ones are accepted"

        async def closed() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", pair.ending.port)
            except ConnectionRefusedError:
                return True
            writer.close()
            return False

        await wait_until(closed, interval_s=0.005, what="it no longer listens")
        closed_s = time.monotonic() - began_s
        assert closed_s > unready_s
        assert await pair.ending.ended() == 0
        ended_s = time.monotonic() - began_s
        aim = load.good + STREAMS
        await wait_until(lambda: load.good >= aim, timeout_s=20, what="the other one goes on")
    await wait_until(lambda: _is_zero(pair.reserved()), what="no reservation is left")
    report = load.report()
    told("SIGTERM", report, unready=unready_s, closed=closed_s, ended=ended_s)
    assert report.ok == report.count, report
    assert load.cut_off == 0, "a request was reset, or its connection closed under it"
    assert (
        ended_s < DELAY_S + 2 * STREAM_S + 3
    )  # each client may ask once more, then idle ones leave


async def test_streams_that_do_not_end_in_time_end_as_errors(alone: Site) -> None:
    """What the grace time does not suffice for ends with an error event, and the exit code is 0."""
    async with alone.long_streams() as load:
        began_s = time.monotonic()
        alone.ending.terminate()
        assert await alone.ending.ended() == 0
        ended_s = time.monotonic() - began_s
    report = load.report()
    told("overdue", report, ended=ended_s)
    assert dict(report.failures) == {(Outcome.ERROR_EVENT, Phase.MIDWAY): STREAMS}
    assert GRACE_S < ended_s < DELAY_S + GRACE_S + 5.0
    assert await alone.reserved() == 0, "its last act is to give back what it had reserved"
    await wait_until(lambda: _is_zero(alone.on_engines()), what="the engines were told")


async def test_a_second_signal_ends_the_wait(alone: Site) -> None:
    """Told twice, a proxy ends its streams with error events and is gone at once, exit code 0."""
    async with alone.long_streams() as load:
        alone.ending.terminate()

        async def draining() -> bool:
            return not await alone.ending.ready()

        await wait_until(draining, what="it drains")
        began_s = time.monotonic()
        alone.ending.process.send_signal(signal.SIGINT)
        assert await alone.ending.ended() == 0
        ended_s = time.monotonic() - began_s
    report = load.report()
    told("SIGTERM, then SIGINT", report, ended=ended_s)
    assert dict(report.failures) == {(Outcome.ERROR_EVENT, Phase.MIDWAY): STREAMS}
    assert ended_s < GRACE_S / 2
    assert await alone.reserved() == 0


async def test_requests_late_in_the_drain_are_refused_or_served(alone: Site) -> None:
    """On a connection that stays, half the grace time is for serving, then comes a polite 503."""
    ask = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
    long: dict[str, Any] = {**ask, "stream": True, "ignore_eos": True}
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
    async with (
        httpx.AsyncClient(base_url=alone.ending.url, limits=limits, timeout=20) as early,
        httpx.AsyncClient(base_url=alone.ending.url, limits=limits, timeout=20) as late,
        asyncio.TaskGroup() as group,
    ):
        # Of the 8 s of grace, and 1.5 of delay, the first stream takes 2, the second 7.
        first = group.create_task(
            early.post("/v1/chat/completions", json={**long, "max_tokens": 50})
        )
        second = group.create_task(
            late.post("/v1/chat/completions", json={**long, "max_tokens": 170})
        )

        async def both() -> bool:
            return await alone.ending.in_flight(MODEL) == 2

        await wait_until(both, what="both are being answered")
        alone.ending.terminate()
        answer = await first
        assert answer.text.endswith("data: [DONE]\n\n")
        served = await early.post("/v1/chat/completions", json={**ask, "max_tokens": 3})
        assert (served.status_code, served.headers["connection"]) == (200, "close")
        answer = await second
        assert answer.text.endswith("data: [DONE]\n\n")
        refused = await late.post("/v1/chat/completions", json={**ask, "max_tokens": 3})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
    assert await alone.ending.ended() == 0


async def test_a_killed_proxy_loses_its_own_streams_and_nothing_else(
    pair: Site, redis_server: RedisServer
) -> None:
    """SIGKILL: its streams are lost; what it had reserved is reaped; the other one notices nothing.

    Its engines are told by the end of its connections, long before the ledger is.
    """
    load = pair.load()
    async with load.users(2 * STREAMS):
        await wait_until(lambda: load.good >= STREAMS, timeout_s=30, what="streams flow")
        began_s = time.monotonic()
        os.kill(pair.ending.pid, signal.SIGKILL)
        (dead,) = await _proxies_but(pair, *pair.staying)

        async def reaped() -> bool:
            return dead not in await pair.registry.ledger.proxies(MODEL)

        await wait_until(reaped, timeout_s=REAPED_S + SLACK_S, what="its reservations are reaped")
        reaped_s = time.monotonic() - began_s
    await wait_until(lambda: _is_zero(pair.reserved()), what="no reservation is left")
    await wait_until(lambda: _is_zero(pair.on_engines()), what="no engine runs anything")
    report = load.report()
    told("SIGKILL", report, reaped=reaped_s)
    assert reaped_s > REAPED_S - 2.0, "it must not be believed dead too early"
    assert set(report.failures) <= {(Outcome.RESET, Phase.MIDWAY)}, report
    assert sum(report.failures.values()) <= STREAMS
    assert {r.port for r in load.results if r.outcome is Outcome.RESET} <= {pair.ending.port}
    audit = await asyncio.to_thread(redmesh, "audit", "--redis-url", redis_server.url)
    assert audit.code == 0, audit


async def test_a_proxy_that_stood_still_takes_its_reservations_again(
    pair: Site, redis_server: RedisServer
) -> None:
    """SIGSTOP: it is reaped like a dead one. SIGCONT: its first beat adopts what it still relays.

    Its clients saw a pause. Not one stream breaks, neither on it nor on the other one.
    """
    ledger = pair.registry.ledger
    async with pair.long_streams(FROZEN_TOKENS) as load:
        (frozen,) = await _proxies_but(pair, *pair.staying)

        async def held() -> set[str]:
            return set(await ledger.leases(MODEL, frozen))

        async def carried() -> set[str]:
            live = await pair.ending.get("/live/requests")
            return set(live.json()["requests"][MODEL]) if live else set()

        before = await carried()
        assert len(before) == STREAMS / 2
        await wait_until(lambda: _equal(held(), before), what="all are reserved")
        os.kill(pair.ending.pid, signal.SIGSTOP)
        began_s = time.monotonic()
        try:

            async def reaped() -> bool:
                return frozen not in await ledger.proxies(MODEL) and not await held()

            await wait_until(reaped, timeout_s=REAPED_S + SLACK_S, what="it is reaped")
            reaped_s = time.monotonic() - began_s
        finally:
            os.kill(pair.ending.pid, signal.SIGCONT)
        thawed_s = time.monotonic()
        await wait_until(
            lambda: _equal(held(), before), timeout_s=BEAT_S, interval_s=0.01, what="adopted again"
        )
        adopted_s = time.monotonic() - thawed_s
        assert await carried() == before, "the streams went on meanwhile"
        audited_s = time.monotonic() - thawed_s
        audit = await asyncio.to_thread(redmesh, "audit", "--redis-url", redis_server.url)
        assert audit.code == 0, audit
        assert audited_s < CLEAN_S, "nobody knows what an earlier audit would have found"
    report = load.report()
    told("SIGSTOP, SIGCONT", report, reaped=reaped_s, adopted=adopted_s, audited=audited_s)
    assert reaped_s > REAPED_S - 2.0, "it must not be believed dead too early"
    assert (report.ok, report.count) == (STREAMS, STREAMS), report
    await wait_until(lambda: _is_zero(pair.reserved()), what="no reservation is left")


async def _equal(found: Awaitable[set[str]], wanted: set[str]) -> bool:
    return await found == wanted


async def _proxies_but(pair: Site, one: ProxyProcess) -> list[str]:
    """Name the proxies that hold reservations, without `one`."""
    live = await one.get("/live/requests")
    assert live is not None
    known = await pair.registry.ledger.proxies(MODEL)
    return [name for name in known if name != live.json()["proxy"]]


async def _is_zero(count: Any) -> bool:  # noqa: ANN401 - an awaitable of a number
    return await count == 0
