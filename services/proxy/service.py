"""One running proxy: its parts put together, its loops, its start and its end."""

import asyncio
import gc
import os
import random
import socket
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import prometheus_client
import structlog

from services.proxy.api.hot import HotRoutes
from services.proxy.app import build_app
from services.proxy.beats import Beats
from services.proxy.convergence import Convergence
from services.proxy.metrics import Metrics
from services.proxy.pool import Endpoints
from services.proxy.resume.api import StreamRoutes
from services.proxy.resume.room import StreamRoom
from services.proxy.server import STOP_S, Server, make_server
from services.proxy.serving import Fleet
from services.proxy.settings import ProxySettings
from services.proxy.table import Tables
from services.proxy.tablefile import TableFile
from services.proxy.workers.tie import Announcement, Tie
from shared.admin import AdminServer, Answer, health_routes, json_answer
from shared.clock import SystemClock
from shared.errors import RegistryError, RegistryUnavailableError
from shared.lifecycle import Loops, every, run_until_stopped, stop_signals
from shared.models.host import Member, MemberKind
from shared.registry import Registry
from shared.registry.connection import check_schema

LAST_RELEASES_S: Final = 2.0
SCHEMA_AGAIN_S: Final = 1.0
READY_POLL_S: Final = 0.02
YOUNG_OBJECTS: Final = 20_000
"""Cycles are looked for after so many new containers, instead of 700: usual requests leave none."""

_log = structlog.get_logger(__name__)


class Service:
    """One running proxy."""

    def __init__(
        self,
        settings: ProxySettings,
        environ: Mapping[str, str],
        proxy: str,
        tables: Tables,
        file: TableFile | None,
        hot: Registry,
        calm: Registry,
    ) -> None:
        self._settings = settings
        self._proxy = proxy
        self._tables = tables
        self._calm = calm
        self._clock = SystemClock()
        self._draining = False
        source = random.Random()  # noqa: S311 - for ties and jitter, not for secrets
        self._metrics = Metrics()
        self._convergence = Convergence(
            tables=tables,
            catalogue=calm.fleet,
            snapshots=calm.replicas,
            hints=calm.routes,
            random=source,
            table_file=file,
        )
        self._fleet = Fleet(
            proxy=proxy,
            settings=settings,
            tables=tables,
            ledger=hot.ledger,
            endpoints=Endpoints(
                settings.fleet_secret,
                environ,
                idle_s=settings.replica_idle_s,
                connect_timeout_s=settings.connect_timeout_s,
            ),
            metrics=self._metrics,
            random=source,
            saw_version=self._convergence.refresh,
        )
        self._room = StreamRoom(self._fleet, calm.streams)
        self._beats = Beats(
            proxy=proxy, fleet=self._fleet, ledger=hot.ledger, metrics=self._metrics, random=source
        )

    def ready(self) -> str | None:
        """Return None, or why this proxy must not get traffic."""
        if self._draining:
            return "draining"
        if not self._tables.catalogued:
            return "the catalogue of models has not been read from Redis yet"
        return None

    def live_requests(self) -> Answer:
        """Show every live request, for audits."""
        now_s = self._fleet.now_s()
        models = self._fleet.served()
        return json_answer(
            {
                "proxy": self._proxy,
                "requests": {
                    served.model: {
                        request: {
                            "rid": holding.rid,
                            "cost_tokens": holding.cost_tokens,
                            "age_ms": round((now_s - holding.since_s) * 1000),
                            "streamed": holding.streamed,
                        }
                        for request, holding in served.reservations.live.items()
                    }
                    for served in models
                },
                "table": {
                    served.model: {
                        "ver": served.table.ver,
                        "authoritative": served.table.authoritative,
                        "replicas": {
                            rid: replica.state for rid, replica in served.table.replicas.items()
                        },
                    }
                    for served in models
                },
                "breaker": "open"
                if any(served.reservations.breaker.open for served in models)
                else "closed",
            }
        )

    async def run(self, listening: socket.socket, port: int, tie: Tie | None = None) -> None:
        """Serve until told to stop, then drain. A worker has a `tie` to its parent."""
        streams = StreamRoutes(self._room)
        hot = HotRoutes(self._fleet, streams)
        app = build_app(
            self._fleet,
            hot,
            streams,
            version=_version(),
            ready=self.ready,
            metrics=tie.metrics if tie is not None else self._shown,
        )
        server = make_server(app, self._settings, hot)
        pages = {
            **health_routes(self.ready),
            "/metrics": lambda: Answer(
                self._show(), content_type=prometheus_client.CONTENT_TYPE_LATEST
            ),
            "/live/requests": self.live_requests,
        }
        async with AdminServer(
            self._settings.admin_host, self._settings.admin_port, pages
        ) as admin:
            with stop_signals() as stop:
                async with Loops() as loops:
                    announce = None
                    if tie is not None:
                        loops.start("parent", _stop_with_parent(tie, stop))
                        announce = partial(tie.announce, Announcement(self._proxy, admin.url))
                    serving = self._start(loops, server, listening, announce)
                    loops.start("member", self._be_member(port, admin.url))
                    _log.info("proxy_started", proxy=self._proxy, port=port, admin=admin.url)
                    gc.collect()
                    gc.freeze()
                    gc.set_threshold(YOUNG_OBJECTS)
                    await run_until_stopped(stop, loops)
                    await self._drain(server, serving, stop)
        _log.info("proxy_ended", proxy=self._proxy)

    def _show(self) -> bytes:
        self._fleet.collect()
        self._metrics.resumable.set(len(self._room))
        return prometheus_client.generate_latest(self._metrics.registry)

    async def _shown(self) -> bytes:
        return self._show()

    def _start(
        self,
        loops: Loops,
        server: Server,
        listening: socket.socket,
        announce: Callable[[], None] | None,
    ) -> asyncio.Task[None]:
        loops.start("schema", self._prove_schema())
        loops.start("hints", self._convergence.run_hints())
        loops.start("catalogue", self._convergence.run_catalogue())
        loops.start("snapshots", self._convergence.run_snapshots())
        loops.start("table-copy", self._convergence.run_copies())
        loops.start("sweeps", self._fleet.run_sweeps())
        loops.start("polls", self._fleet.run_polls())
        loops.start("beats", every(self._beats.interval_s, self._beats.beat_all))
        loops.start("connections", server.sweep_connections())
        return loops.start("serve", self._serve(server, listening, announce))

    async def _serve(
        self, server: Server, listening: socket.socket, announce: Callable[[], None] | None
    ) -> None:
        """Serve; a worker only once it can answer, for others on its port can already."""
        if announce is not None:
            while not self._tables.catalogued:
                if self._draining:
                    listening.close()
                    return
                await asyncio.sleep(READY_POLL_S)
            announce()
        await server.serve(sockets=[listening])

    async def _prove_schema(self) -> None:
        """Check the data's schema once Redis can be asked; another schema ends the service.

        Done before the start where Redis was there, and here for a start without it.
        """
        while True:
            try:
                await check_schema(self._calm.connection, self._calm.keys)
            except RegistryUnavailableError:
                await asyncio.sleep(SCHEMA_AGAIN_S)
            else:
                return

    async def _be_member(self, port: int, admin_url: str) -> None:
        host = self._settings.host
        shown = f"[{host}]" if ":" in host else host
        member = Member(
            kind=MemberKind.PROXY,
            id=self._proxy,
            host=self._settings.host_name,
            pid=os.getpid(),
            version=_version(),
            started_ms=self._clock.now_ms(),
            url=f"http://{shown}:{port}",
            admin_url=admin_url,
        )

        async def beat() -> None:
            try:
                await self._calm.fleet.beat(member)
            except RegistryError as error:
                _log.debug("member_not_beaten", error=str(error))

        try:
            await every(self._beats.interval_s, beat)
        finally:
            await self._leave(member)

    async def _leave(self, member: Member) -> None:
        try:
            async with asyncio.timeout(1.0):
                await self._calm.fleet.forget_member(member.field)
        except (RegistryError, TimeoutError) as error:
            _log.debug("member_not_forgotten", error=str(error))

    async def _drain(
        self, server: Server, serving: asyncio.Task[None], stop: asyncio.Event
    ) -> None:
        """Fail readiness, refuse connections, let answers finish, end those that do not.

        Who is connected may go on asking for half of the time, so that what is accepted last has
        the other half to finish. A second signal ends the wait.
        """
        settings = self._settings
        began_s = self._fleet.now_s()
        _log.info("proxy_draining", in_flight=self._fleet.in_flight())
        self._draining = True
        stop.clear()
        again = asyncio.ensure_future(stop.wait())
        server.leave()
        await asyncio.wait({again}, timeout=settings.drain_delay_s)
        server.should_exit = True
        half_s = settings.drain_timeout_s / 2
        ends = {serving, again}
        await asyncio.wait(ends, timeout=half_s, return_when=asyncio.FIRST_COMPLETED)
        server.refuse()
        if not serving.done():
            await asyncio.wait(ends, timeout=half_s, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            _log.warning("drain_overdue", in_flight=self._fleet.in_flight(), told=again.done())
            await self._room.aclose()
            self._fleet.shut()
            await asyncio.wait({serving}, timeout=STOP_S)
        again.cancel()
        await self._room.aclose()
        await self._fleet.aclose(deadline_s=LAST_RELEASES_S)
        _log.info(
            "proxy_drained",
            seconds=round(self._fleet.now_s() - began_s, 3),
            refused=server.ending.refused,
        )


async def _stop_with_parent(tie: Tie, stop: asyncio.Event) -> None:
    await tie.parent_ended()
    _log.warning("parent_ended", action="drain")
    stop.set()


def _version() -> str:
    try:
        return version("redmesh")
    except PackageNotFoundError:
        return "0"
