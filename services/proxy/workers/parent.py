"""The parent of several workers: holds the port, starts, replaces and ends them, sums them up.

On SIGTERM or SIGINT it fails its readiness and passes the signal on once: every worker drains by
its own stages. A second signal is passed on likewise, and hurries them. What is left when even the
time for that is over is killed.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Final

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge

from services.proxy.server import STOP_S, PortTakenError, bind
from services.proxy.settings import ProxySettings
from services.proxy.workers.child import Child, environment
from services.proxy.workers.merging import (
    Page,
    lasting,
    merge_live,
    merge_pages,
    show_page,
)
from services.proxy.workers.rules import Backoff
from shared.admin import AdminServer, Answer, health_routes, json_answer
from shared.lifecycle import Loops, run_until_stopped, stop_signals

RELEASED_S: Final = 1.0
"""Workers whose parent was killed drain; this long after their delay none of them listens."""
PORT_POLL_S: Final = 0.05
LAST_WORDS_S: Final = 5.0
"""What workers get after their last stage, for the ledger and for ending."""

_log = structlog.get_logger(__name__)


class _Slot:
    """One of the workers, through all processes that take its place."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.child: Child | None = None
        self.failed = False
        """One has ended by itself."""
        self.backoff = Backoff()


class Parent:
    """Runs `settings.workers` workers."""

    def __init__(self, settings: ProxySettings, environ: Mapping[str, str]) -> None:
        self._settings = settings
        self._environ = environ
        self._slots = [_Slot(number) for number in range(settings.workers)]
        self._ending = asyncio.Event()
        self._was_up = False
        self._code = 0
        self._counted: Page = ()
        """What workers counted that have ended."""
        self._registry = CollectorRegistry()
        self._up = Gauge(
            "redmesh_proxy_workers", "Worker processes that are up.", registry=self._registry
        )
        self._restarts = Counter(
            "redmesh_proxy_worker_restarts",
            "Worker processes that ended by themselves and were started again.",
            registry=self._registry,
        )

    async def run(self) -> int:
        """Run until told to stop and all have drained; return the exit code.

        Raises PortTakenError, and OSError if the admin port is taken.
        """
        settings = self._settings
        async with hold_port(
            settings.host, settings.port, patience_s=settings.drain_delay_s + RELEASED_S
        ) as port:
            pages = {
                **health_routes(self._unready),
                "/metrics": self._metrics,
                "/live/requests": self._live,
            }
            async with AdminServer(settings.admin_host, settings.admin_port, pages) as admin:
                with stop_signals() as stop:
                    async with Loops() as loops:
                        keepers = {
                            loops.start(
                                f"worker-{slot.number}", self._keep(slot, port, admin.url, stop)
                            )
                            for slot in self._slots
                        }
                        _log.info(
                            "workers_started",
                            workers=len(self._slots),
                            port=port,
                            admin=admin.url,
                            pid=os.getpid(),
                        )
                        await run_until_stopped(stop, loops)
                        await self._drain(keepers, stop)
        _log.info("workers_ended", exit_code=self._code)
        return self._code

    async def _keep(self, slot: _Slot, port: int, admin_url: str, stop: asyncio.Event) -> None:
        """Keep one worker running until the end of all."""
        given = environment(self._settings, self._environ, slot.number, port)
        while not self._ending.is_set():
            began_s = time.monotonic()
            code = await self._run_once(slot, given, f"{admin_url}/metrics")
            if self._ending.is_set():
                return
            slot.failed = True
            if not self._was_up and all(each.failed for each in self._slots):
                # None has ever come up, so this is not a crash: they have said what is wrong.
                self._code = code if code > 0 else 1
                self._ending.set()
                stop.set()
                return
            wait_s = slot.backoff.wait_s(time.monotonic() - began_s)
            self._restarts.inc()
            _log.warning(
                "worker_ended", worker=slot.number, exit_code=code, again_in_s=round(wait_s, 1)
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._ending.wait()

    async def _run_once(self, slot: _Slot, given: Mapping[str, str], metrics_url: str) -> int:
        try:
            child, reader = await Child.start(slot.number, given, metrics_url)
        except OSError as error:
            sys.stderr.write(f"redmesh proxy: a worker cannot be started: {error}\n")
            return 1
        slot.child = child
        if self._ending.is_set():  # told to end while it was being started
            child.signal(signal.SIGTERM)
        hearing = asyncio.ensure_future(self._hear(slot.number, child, reader))
        try:
            return await child.ended()
        finally:
            slot.child = None
            hearing.cancel()
            self._counted = merge_pages([self._counted, lasting(child.page)])

    async def _hear(self, number: int, child: Child, reader: asyncio.StreamReader) -> None:
        if await child.hear(reader) and child.said is not None:
            self._was_up = True
            _log.info("worker_up", worker=number, pid=child.pid, proxy=child.said.proxy)

    def _children(self) -> list[Child]:
        return [slot.child for slot in self._slots if slot.child is not None]

    def _signal(self, number: signal.Signals) -> None:
        for child in self._children():
            child.signal(number)

    async def _drain(self, keepers: set[asyncio.Task[None]], stop: asyncio.Event) -> None:
        """Pass the signal on, and wait for the end of all; a second one is passed on, too."""
        settings = self._settings
        self._ending.set()
        stop.clear()
        again = asyncio.ensure_future(stop.wait())
        self._signal(signal.SIGTERM)
        full_s = settings.drain_delay_s + settings.drain_timeout_s + STOP_S + LAST_WORDS_S
        ended = asyncio.ensure_future(asyncio.wait(keepers))
        await asyncio.wait({ended, again}, timeout=full_s, return_when=asyncio.FIRST_COMPLETED)
        if again.done() and not ended.done():
            self._signal(signal.SIGTERM)
            await asyncio.wait({ended}, timeout=STOP_S + LAST_WORDS_S)
        again.cancel()
        if not ended.done():
            left = [child.pid for child in self._children()]
            _log.error("workers_killed", pids=left, why="they did not end in time")
            self._code = 1
            self._signal(signal.SIGKILL)
            await ended

    async def _unready(self) -> str | None:
        """Return None once any worker is ready, or why this proxy must not get traffic."""
        if self._ending.is_set():
            return "draining"
        for asked in asyncio.as_completed([child.is_ready() for child in self._children()]):
            if await asked:
                return None
        return "no worker is ready"

    async def _metrics(self) -> Answer:
        asked = self._children()
        answered = await asyncio.gather(*(child.read_metrics() for child in asked))
        silent = {child for child, answer in zip(asked, answered, strict=True) if not answer}
        # From here on nothing is awaited: who ended meanwhile is in what was counted, once.
        children = self._children()
        self._up.set(sum(child.said is not None for child in children))
        page = merge_pages(
            [
                list(self._registry.collect()),
                self._counted,
                *(lasting(each.page) if each in silent else each.page for each in children),
            ]
        )
        return Answer(show_page(page), content_type=CONTENT_TYPE_LATEST)

    async def _live(self) -> Answer:
        pages = await asyncio.gather(*(child.live() for child in self._children()))
        name = self._settings.proxy_name or f"px-{self._settings.host_name}"
        return json_answer(merge_live(name, [page for page in pages if page is not None]))


@contextlib.asynccontextmanager
async def hold_port(host: str, port: int, *, patience_s: float) -> AsyncGenerator[int]:
    """Hold the port while the block runs, without getting connections; yields its number.

    Port 0 becomes one number for all workers. A socket that shares its port would also share it
    with another proxy, by mistake: so one who listens there already is looked for. Workers of a
    killed parent still do, for a moment, hence some patience. Raises PortTakenError.
    """
    deadline_s = time.monotonic() + patience_s
    while True:
        with bind(host, port, shared=True) as held:
            if not _is_listened_on(held):
                yield held.getsockname()[1]
                return
        if time.monotonic() >= deadline_s:
            raise PortTakenError(
                f"cannot listen on {host}:{port}: another proxy does, and its port can be shared "
                "only by its own workers; stop it, or give another --port"
            )
        await asyncio.sleep(PORT_POLL_S)


def _is_listened_on(held: socket.socket) -> bool:
    """Tell whether somebody listens on the port of `held`, which itself does not."""
    with socket.socket(held.family, held.type) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(held.getsockname())
        except OSError:
            return True
    return False
