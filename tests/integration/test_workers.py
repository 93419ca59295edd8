"""Several workers behind one port, on real processes: balanced, replaced, drained, summed up.

One proxy of two workers, a Redis and two simulated engines. Each test prints what it measured.
"""

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import psutil
import pytest

from services.cli.auditing import examine
from shared.models.host import Member, MemberKind
from shared.registry import Registry, open_registry
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.servers import RedisServer, any_binary
from tests.support.standalone import ProxyProcess, declare, proxy, simengine
from tests.support.streams import Load, Phase, Report
from tests.support.verdicts import Outcome
from tests.support.waiting import wait_until

MODEL = "sim"
WORKERS = 2
USERS = 60
TOKENS = 30
STEP_MS = 30
REAPED_S = 7.0
"""Silent for 5 s, then suspect for 2 s."""
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
    """One proxy of two workers."""

    def __init__(self, registry: Registry, running: ProxyProcess) -> None:
        self.registry = registry
        self.proxy = running

    def load(self) -> Load:
        """Make load for it."""
        return Load([self.proxy.port], MODEL, max_tokens=TOKENS, patience_s=5)

    async def workers(self) -> list[Member]:
        """Name the workers that are members and alive."""
        members = (await self.registry.fleet.members()).values()
        return [
            seen.member
            for seen in members
            if seen.member.kind is MemberKind.PROXY and psutil.pid_exists(seen.member.pid)
        ]

    async def carried(self, worker: Member) -> float:
        """Read how many requests a worker has answered well, by its own count."""
        return _answered(await self.proxy.get("/metrics", worker.admin_url))

    async def all_serve(self) -> bool:
        """Tell whether both workers are up and serve the model."""
        workers = await self.workers()
        if len(workers) != WORKERS:
            return False
        for worker in workers:
            live = await self.proxy.get("/live/requests", worker.admin_url)
            if live is None or MODEL not in live.json()["table"]:
                return False
        return True

    async def audit_is_clean(self) -> bool:
        """Do what `redmesh audit` does."""
        return not (await examine(self.registry)).findings


@pytest.fixture
async def site(redis_server: RedisServer, tmp_path: Path) -> AsyncGenerator[Site]:
    """Run it; afterwards no process of it may be left."""
    async with AsyncExitStack() as stack:
        step = ("--step-ms", str(STEP_MS), "--decode-us-per-seq", "0")
        engines = [await stack.enter_async_context(simengine(MODEL, *step)) for _ in range(2)]
        registry = await open_registry(CommonSettings(redis_url=Secret(redis_server.url)))
        stack.push_async_callback(registry.aclose)
        await declare(registry, MODEL, engines)
        running = await stack.enter_async_context(
            proxy(
                redis_server.url,
                log=str(tmp_path / "proxy.log"),
                workers=WORKERS,
                state_dir=tmp_path / "state",
                drain_timeout_s=20,
            )
        )
        one = Site(registry, running)
        await wait_until(one.all_serve, timeout_s=60, what="both workers serve")
        pids = [worker.pid for worker in await one.workers()]
        yield one
        pids += [worker.pid for worker in await one.workers()]
        if running.process.returncode is None:
            running.process.kill()
            await running.process.wait()
        for pid in pids:
            await wait_until(
                lambda pid=pid: not psutil.pid_exists(pid), timeout_s=30, what="a worker is gone"
            )


def _answered(page: httpx.Response | None) -> float:
    found = re.search(
        rf'^redmesh_proxy_requests_total{{model="{MODEL}",outcome="2xx"}} (\S+)$',
        page.text if page else "",
        re.MULTILINE,
    )
    return float(found[1]) if found else 0.0


def told(what: str, report: Report, **figures: float) -> None:
    """Print what was measured."""
    shown = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
    print(f"\n{what}: {shown}\n{report}")  # noqa: T201 - figures for the reader


async def test_workers_share_the_load_and_show_their_sum(site: Site) -> None:
    """Both workers carry some of it, and metrics on either port are the sum of what was asked."""
    load = site.load()
    async with load.users(USERS):
        await wait_until(lambda: load.good >= 2 * USERS, timeout_s=40, what="streams flow")
    report = load.report()
    assert report.ok == report.count, report
    shares = [await site.carried(worker) for worker in await site.workers()]
    told("balanced", report, first=shares[0], second=shares[1])
    assert min(shares) > 0.2 * sum(shares)
    assert sum(shares) == report.ok
    for base in (site.proxy.admin, site.proxy.url):
        page = await site.proxy.get("/metrics", base)
        assert page is not None
        assert _answered(page) == report.ok
        assert f'redmesh_proxy_ready_replicas{{model="{MODEL}"}} 2.0' in page.text
        assert f"redmesh_proxy_workers {WORKERS}.0" in page.text
    frozen = (await site.workers())[0].pid
    os.kill(frozen, signal.SIGSTOP)
    try:
        assert _answered(await site.proxy.get("/metrics")) == report.ok, "as it was shown last"
        assert await site.proxy.ready(), "the other one is"
    finally:
        os.kill(frozen, signal.SIGCONT)
    assert await site.audit_is_clean()


async def test_live_requests_of_all_workers_are_on_one_page(site: Site) -> None:
    """The parent's page has every stream under way, and each worker's own page has its own."""
    load = site.load()
    async with load.users(USERS):
        await wait_until(lambda: load.streaming > USERS / 2, timeout_s=30, what="streams flow")
        live = await site.proxy.get("/live/requests")
        assert live is not None
        page = live.json()
        names = {worker.id for worker in await site.workers()}
        assert set(page["workers"]) == names
        assert {request.split("/")[0] for request in page["requests"][MODEL]} == names
        assert await site.audit_is_clean(), "under load, too"


async def test_a_killed_worker_loses_its_own_streams_and_is_replaced(site: Site) -> None:
    """SIGKILL: its streams break, the other's do not, who comes now is served, a new one joins."""
    load = site.load()
    async with load.users(USERS):
        await wait_until(lambda: load.good >= USERS, timeout_s=30, what="streams flow")
        victim, other = await site.workers()
        counted = _answered(await site.proxy.get("/metrics"))
        began_s = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        async with httpx.AsyncClient(timeout=10) as http:
            for _ in range(8):
                ask = {"model": MODEL, "prompt": "Hello", "max_tokens": 1}
                async with http.stream("POST", f"{site.proxy.url}/v1/completions", json=ask) as got:
                    assert got.status_code == 200
        served_s = time.monotonic() - began_s
        assert await site.proxy.ready(), "one worker is enough"
        assert _answered(await site.proxy.get("/metrics")) >= counted, "what was counted stays"

        async def reaped() -> bool:
            return victim.id not in await site.registry.ledger.proxies(MODEL)

        await wait_until(reaped, timeout_s=REAPED_S + SLACK_S, what="its reservations are reaped")
        reaped_s = time.monotonic() - began_s
        assert await site.audit_is_clean(), "at once"
        clean_s = time.monotonic() - began_s
        await wait_until(site.all_serve, timeout_s=20, what="it is replaced")
    report = load.report()
    told("SIGKILL", report, served=served_s, reaped=reaped_s, clean=clean_s)
    assert set(report.failures) <= {(Outcome.RESET, Phase.MIDWAY)}, report
    assert 0 < sum(report.failures.values()) < USERS
    new = [worker for worker in await site.workers() if worker.pid != other.pid]
    assert [worker.id.rpartition("-")[0] for worker in new] == [victim.id.rpartition("-")[0]]
    page = await site.proxy.get("/metrics")
    assert page is not None
    assert "redmesh_proxy_worker_restarts_total 1.0" in page.text


async def test_a_worker_that_drains_resets_nobody(site: Site) -> None:
    """SIGTERM to one worker: its streams end well, others go to its sibling, it is replaced."""
    load = site.load()
    async with load.users(USERS):
        await wait_until(lambda: load.good >= USERS, timeout_s=30, what="streams flow")
        before = {worker.pid for worker in await site.workers()}
        os.kill(min(before), signal.SIGTERM)

        async def replaced() -> bool:
            return min(before) not in {w.pid for w in await site.workers()} and (
                await site.all_serve()
            )

        await wait_until(replaced, timeout_s=30, what="it is replaced")
        aim = load.good + USERS
        await wait_until(lambda: load.good >= aim, timeout_s=20, what="streams flow on")
    report = load.report()
    told("SIGTERM to one worker", report)
    assert report.ok == report.count, report
    assert load.cut_off == 0, "a request was reset, or its connection closed under it"


async def test_a_proxy_that_is_told_to_end_breaks_nothing(site: Site) -> None:
    """SIGTERM to the parent: readiness fails first, every answer is whole, the exit code is 0."""
    load = site.load()
    pids = [worker.pid for worker in await site.workers()]
    async with load.users(USERS):
        await wait_until(lambda: load.good >= USERS, timeout_s=30, what="streams flow")
        began_s = time.monotonic()
        site.proxy.terminate()

        async def not_ready() -> bool:
            return not await site.proxy.ready()

        await wait_until(not_ready, interval_s=0.005, what="readiness fails")
        assert await site.proxy.get("/health/live")
    report = load.report()
    assert await site.proxy.ended() == 0
    told("SIGTERM", report, ended=time.monotonic() - began_s)
    assert {kind for kind, phase in report.failures if phase is Phase.MIDWAY} == set(), report
    assert load.cut_off == 0, "a request was reset, or its connection closed under it"
    assert set(report.failures) <= {(Outcome.REFUSED, Phase.BEFORE)}, report
    assert not any(psutil.pid_exists(pid) for pid in pids)
    totals = await site.registry.ledger.totals(MODEL)
    assert sum(total.requests for total in totals.values()) == 0


async def test_a_second_signal_ends_the_wait(site: Site) -> None:
    """Told twice, all workers end their streams with error events, and the exit code is 0."""
    load = Load([site.proxy.port], MODEL, max_tokens=2000, patience_s=5)
    async with asyncio.TaskGroup() as group:
        for user in range(USERS):
            group.create_task(load.ask(user))
        await wait_until(lambda: load.streaming == USERS, timeout_s=20, what="they stream")
        site.proxy.terminate()

        async def draining() -> bool:
            return not await site.proxy.ready()

        await wait_until(draining, what="it drains")
        began_s = time.monotonic()
        site.proxy.process.send_signal(signal.SIGINT)
        assert await site.proxy.ended() == 0
        ended_s = time.monotonic() - began_s
    report = load.report()
    told("SIGTERM, then SIGINT", report, ended=ended_s)
    assert dict(report.failures) == {(Outcome.ERROR_EVENT, Phase.MIDWAY): USERS}
    assert ended_s < 8


async def test_workers_of_a_killed_parent_drain(site: Site) -> None:
    """SIGKILL to the parent: its workers finish what they carry, leave the port, and are gone."""
    load = site.load()
    async with load.users(USERS):
        await wait_until(lambda: load.good >= USERS, timeout_s=30, what="streams flow")
        pids = [worker.pid for worker in await site.workers()]
        site.proxy.process.kill()
        await site.proxy.process.wait()

        async def refused() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", site.proxy.port)
            except ConnectionRefusedError:
                return True
            writer.close()
            return False

        await wait_until(refused, timeout_s=5, interval_s=0.05, what="nobody listens")
    report = load.report()
    told("SIGKILL to the parent", report)
    assert set(report.failures) <= {(Outcome.REFUSED, Phase.BEFORE)}, report
    assert load.cut_off == 0, "a request was reset, or its connection closed under it"
    for pid in pids:
        await wait_until(lambda pid=pid: not psutil.pid_exists(pid), timeout_s=20, what="gone")
