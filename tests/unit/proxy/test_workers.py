"""Several workers behind one port: what their parent decides, merges and holds."""

import asyncio
import os
import socket
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from services.proxy.main import run
from services.proxy.server import PortTakenError, bind
from services.proxy.settings import ProxySettings
from services.proxy.tablefile import TableFile
from services.proxy.workers import rules
from services.proxy.workers.child import environment
from services.proxy.workers.merging import (
    LivePage,
    Page,
    lasting,
    merge_live,
    merge_pages,
    read_page,
    show_page,
)
from services.proxy.workers.parent import hold_port
from shared.errors import InvalidInputError
from shared.secret import Secret
from shared.settings import load
from tests.support.servers import free_port
from tests.support.standalone import proxy


class Worker:
    """The metrics of a worker that has answered some requests."""

    def __init__(self, requests: int, *, replicas: int, model: str = "demo") -> None:
        registry = CollectorRegistry()
        asked = Counter("redmesh_proxy_requests", "Asked.", ("model", "outcome"), registry=registry)
        asked.labels(model, "2xx").inc(requests)
        busy = Gauge("redmesh_proxy_in_flight", "Now.", ("model",), registry=registry)
        busy.labels(model).set(requests)
        known = Gauge("redmesh_proxy_ready_replicas", "Known.", ("model",), registry=registry)
        known.labels(model).set(replicas)
        took = Histogram("redmesh_proxy_s", "Took.", ("model",), buckets=(1, 2), registry=registry)
        for number in range(requests):
            took.labels(model).observe(number)
        self.text = generate_latest(registry).decode()

    @property
    def page(self) -> Page:
        """Give them as read from its admin port."""
        return read_page(self.text)


def lines(page: Page) -> list[str]:
    """Give the samples that a page shows, without when they were created."""
    shown = show_page(page).decode().splitlines()
    return [line for line in shown if line[0] != "#" and "_created" not in line]


def test_one_page_is_shown_as_it_was() -> None:
    """Nothing is lost or changed on the way through the merge."""
    worker = Worker(3, replicas=2)
    assert show_page(merge_pages([worker.page])).decode() == worker.text


def test_counters_histograms_and_loads_add_up() -> None:
    """What each worker counts for itself is summed up, by labels."""
    merged = lines(merge_pages([Worker(3, replicas=2).page, Worker(1, replicas=2).page]))
    assert 'redmesh_proxy_requests_total{model="demo",outcome="2xx"} 4.0' in merged
    assert 'redmesh_proxy_in_flight{model="demo"} 4.0' in merged
    assert 'redmesh_proxy_s_bucket{le="1.0",model="demo"} 3.0' in merged
    assert 'redmesh_proxy_s_bucket{le="+Inf",model="demo"} 4.0' in merged
    assert 'redmesh_proxy_s_count{model="demo"} 4.0' in merged
    assert 'redmesh_proxy_s_sum{model="demo"} 3.0' in merged


def test_what_all_workers_know_is_not_added_up() -> None:
    """Two workers that both know three replicas know three."""
    merged = lines(merge_pages([Worker(1, replicas=3).page, Worker(1, replicas=2).page]))
    assert 'redmesh_proxy_ready_replicas{model="demo"} 3.0' in merged


def test_a_model_that_only_one_worker_knows_is_shown() -> None:
    """Label values of either worker are there, and each family is in one piece."""
    page = merge_pages([Worker(1, replicas=1).page, Worker(2, replicas=1, model="other").page])
    assert 'redmesh_proxy_in_flight{model="demo"} 1.0' in lines(page)
    assert 'redmesh_proxy_in_flight{model="other"} 2.0' in lines(page)
    types = [line for line in show_page(page).decode().splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types))


def test_the_earliest_creation_is_shown() -> None:
    """Since when something is counted is no sum."""
    page = merge_pages([Worker(1, replicas=1).page, Worker(1, replicas=1).page])
    shown = show_page(page).decode().splitlines()
    (created,) = [line for line in shown if line.startswith("redmesh_proxy_requests_created{")]
    assert float(created.split()[-1]) < 4e9


def test_what_a_worker_counted_outlives_it() -> None:
    """Of a worker that has ended, totals stay, and what was true at the moment goes."""
    merged = lines(merge_pages([lasting(Worker(5, replicas=9).page), Worker(1, replicas=2).page]))
    assert 'redmesh_proxy_requests_total{model="demo",outcome="2xx"} 6.0' in merged
    assert 'redmesh_proxy_s_count{model="demo"} 6.0' in merged
    assert 'redmesh_proxy_in_flight{model="demo"} 1.0' in merged
    assert 'redmesh_proxy_ready_replicas{model="demo"} 2.0' in merged


def live(name: str, ver: int, *requests: str, breaker: str = "closed") -> LivePage:
    """Make what a worker answers on `/live/requests`."""
    return LivePage(
        proxy=name,
        requests={"demo": {request: {"rid": "r"} for request in requests}},
        table={"demo": {"ver": ver, "replicas": {f"at-{ver}": "READY"}}},
        breaker=breaker,
    )


def test_requests_of_all_workers_are_side_by_side() -> None:
    """Two workers' requests of one number are two; the table shown is the newest."""
    merged = merge_live("px", [live("a", 1, "7"), live("b", 2, "7", "8", breaker="open")])
    assert set(merged.requests["demo"]) == {"a/7", "b/7", "b/8"}
    assert merged.table["demo"]["ver"] == 2
    assert merged.breaker == "open"
    assert (merged.proxy, merged.workers) == ("px", ["a", "b"])


def test_a_worker_that_keeps_crashing_is_started_ever_more_rarely() -> None:
    """The wait doubles up to its bound, and begins anew after a steady run."""
    backoff = rules.Backoff()
    assert [backoff.wait_s(0.1) for _ in range(7)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert backoff.wait_s(rules.STEADY_S) == rules.FIRST_WAIT_S


def test_a_worker_gets_the_settings_of_its_parent() -> None:
    """Flags reach it, too; port and admin port are its own; secrets stay where they were."""
    environ = {"REDMESH_REDIS_URL_FILE": "/x", "REDMESH_FLEET_SECRET": "s", "REDMESH_PORT": "0"}
    settings = ProxySettings(
        fleet_secret=Secret("s"), workers=3, drain_delay_s=0.25, admin_port=9100, host_name="h"
    )
    given = environment(settings, environ, slot=1, port=4711)
    assert given["REDMESH_REDIS_URL_FILE"] == "/x"
    assert "REDMESH_REDIS_URL" not in given
    del given["REDMESH_REDIS_URL_FILE"]
    wanted = ProxySettings(
        fleet_secret=Secret("s"),
        workers=1,
        drain_delay_s=0.25,
        admin_port=9102,
        host_name="h",
        port=4711,
    )
    assert load(ProxySettings, given) == wanted


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (ProxySettings(workers=0), "REDMESH_WORKERS=0"),
        (ProxySettings(workers=257), "REDMESH_WORKERS=257"),
        (ProxySettings(workers=4, admin_port=65_533), "REDMESH_ADMIN_PORT=65533"),
    ],
)
def test_senseless_settings_are_refused(settings: ProxySettings, named: str) -> None:
    """What makes no sense is refused by the name of its setting."""
    with pytest.raises(InvalidInputError, match=named):
        run(settings)


def test_two_workers_write_one_copy_of_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writes beside the copy under a name of its own, so that none is torn."""
    written: list[str] = []
    replace = Path.replace

    def renamed(self: Path, target: Path) -> Path:
        written.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", renamed)
    for pid in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        TableFile(tmp_path).write(b"%d" % pid)
    assert len(set(written)) == 2
    assert TableFile(tmp_path).read() == b"2"
    assert [path.name for path in tmp_path.iterdir()] == ["routes.json"]


@contextmanager
def listening(port: int) -> Generator[socket.socket]:
    """Listen as a worker does."""
    with bind("127.0.0.1", port, shared=True) as listener:
        listener.listen()
        yield listener


async def test_a_held_port_goes_to_the_workers() -> None:
    """Port 0 becomes one number; who holds it gets no connection, who listens there gets all."""
    with ExitStack() as stack:
        async with hold_port("127.0.0.1", 0, patience_s=0) as port:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            workers = [stack.enter_context(listening(port)) for _ in range(2)]
            for _ in range(32):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        accepted = 0
        for worker in workers:
            worker.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    stack.enter_context(worker.accept()[0])
                    accepted += 1
        assert accepted == 32


async def test_a_port_is_not_shared_with_another_proxy_by_mistake() -> None:
    """Who listens on a port that could be shared is noticed as much as one that could not."""
    with bind("127.0.0.1", 0, shared=True) as other:
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortTakenError, match="another proxy"):
            async with hold_port("127.0.0.1", port, patience_s=0.1):
                pass
    with bind("127.0.0.1", 0) as stranger, pytest.raises(PortTakenError, match="stop what uses it"):
        async with hold_port("127.0.0.1", stranger.getsockname()[1], patience_s=0.1):
            pass


async def test_workers_of_a_killed_parent_are_waited_for() -> None:
    """A port on which somebody still listens for a moment is taken when he has left."""
    with bind("127.0.0.1", 0, shared=True) as leaving:
        leaving.listen()
        port = leaving.getsockname()[1]
        asyncio.get_running_loop().call_later(0.2, leaving.close)
        async with hold_port("127.0.0.1", port, patience_s=5) as held:
            assert held == port


async def test_workers_that_cannot_start_end_their_parent() -> None:
    """Without Redis no worker comes up: the exit code is 1, as that of one process."""
    async with proxy(f"redis://127.0.0.1:{free_port()}/0", workers=2) as running:
        assert await running.ended(timeout_s=60) == 1
