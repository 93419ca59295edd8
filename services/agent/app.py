"""The agent put together: its parts, its loops, and how it ends.

It ends without its engines, unless `stop_engines_on_exit` says otherwise: a new agent process
adopts them. It starts without Redis if there are engines to watch over, and connects later.
"""

import asyncio
import contextlib
import fcntl
import importlib.metadata
import os
import random
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Final

import structlog

import services
from services.agent import inventory
from services.agent.drills import Drills
from services.agent.engine import TEARDOWN_S, Tools
from services.agent.keeper import Keeper
from services.agent.launch import Surroundings, usable
from services.agent.remembering import REMEMBER_S, Remembering
from services.agent.settings import AgentSettings
from services.agent.starting import Starter
from services.agent.statefile import EngineFolders
from services.agent.telemetry import Telemetry
from shared.admin import AdminServer, Answer, health_routes, json_answer, metrics_route
from shared.clock import Clock
from shared.errors import EngineError, RegistryError, RegistryUnavailableError
from shared.lifecycle import Loops, every, run_until_stopped, stop_signals
from shared.models.host import Host, Member, MemberKind
from shared.registry import Registry, open_registry

_log = structlog.get_logger(__name__)

RECONNECT_S: Final = 1.0
LOCK_FILE: Final = "agent.lock"
"""Locked by the agent of a state directory; holds when that agent began (ms)."""
NAMESAKE_POLL_S: Final = 0.2
NAMESAKE_BEATS: Final = 2.5
"""An agent that has not beaten for so many intervals is no other agent any more."""


class Agent:
    """One host's agent."""

    def __init__(
        self, settings: AgentSettings, clock: Clock, environ: Mapping[str, str], state_dir: Path
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._state_dir = state_dir
        self._telemetry = Telemetry()
        self._wake = asyncio.Event()
        self._loops = Loops()
        self._registry: Registry | None = None
        self._started_ms = clock.now_ms()
        self._host = inventory.look(settings, self._started_ms)
        self._remembering = Remembering(state_dir)
        folders = EngineFolders(state_dir)
        self.keeper = Keeper(
            settings=settings,
            clock=clock,
            starter=Starter(
                Tools(
                    settings=settings,
                    clock=clock,
                    folders=folders,
                    telemetry=self._telemetry,
                    changed=self._wake.set,
                ),
                _surroundings(settings, environ, self._host),
            ),
            folders=folders,
            telemetry=self._telemetry,
            loops=self._loops,
            wake=self._wake,
        )

    async def run(self) -> None:
        """Serve until a signal; raise what this host or Redis lacks at the start."""
        with stop_signals() as stop:
            try:
                async with self._loops:
                    await self._serve(stop)
            finally:
                if self._registry is not None:
                    await self._registry.aclose()
        _log.info("agent_ended")

    async def _serve(self, stop: asyncio.Event) -> None:
        adopted = self.keeper.adopt_all()
        await self._connect(alone=adopted == 0)
        await self._claim_name()
        async with self._admin() as admin:
            member = self._member(admin.url)
            _log.info(
                "agent_started",
                host=self._host.host,
                admin_url=admin.url,
                adopted=adopted,
                gpus=len(self._host.gpus),
                engines=list(self._host.engines),
            )
            self._start_loops(member)
            await run_until_stopped(stop, self._loops)
            if self._settings.stop_engines_on_exit:
                await self._stop_engines(member)

    def _start_loops(self, member: Member) -> None:
        settings = self._settings
        if self._registry is None:
            self._loops.start("connect", self._connect_later())
        self._loops.start(
            "look",
            every(lambda: settings.orders_interval_s, self.keeper.look, wake=self._wake),
        )
        self._loops.start(
            "beat",
            every(
                lambda: settings.beat_interval_s * random.uniform(0.8, 1.2),  # noqa: S311 - spreads beats, guards nothing
                lambda: self.keeper.beat(member, self._host),
            ),
        )
        if settings.drills_allowed:
            drills = Drills(self._clock, self._host.host)
            self._loops.start("drills", drills.run(lambda: self._registry, self.keeper.views))
        self._loops.start(
            "remember",
            every(
                lambda: REMEMBER_S * random.uniform(0.8, 1.2),  # noqa: S311 - spreads reads, guards nothing
                lambda: self._remembering.refresh(self._registry),
            ),
        )

    async def _connect(self, *, alone: bool) -> None:
        """Open the registry. Without engines to watch over, an agent without Redis is no use."""
        try:
            self._registry = await open_registry(self._settings)
        except RegistryUnavailableError as error:
            if alone:
                raise
            _log.warning("redis_away", error=str(error), effect="watching over adopted engines")
            return
        self.keeper.connect(self._registry)

    async def _claim_name(self) -> None:
        """Raise `EngineError` when another agent is this host already.

        Two would be worse than none: each calls the other's engines dead, as it finds no process.
        The agent that held this state directory before has ended, since its lock is ours: there is
        nothing to wait for. Any other shows by its next beat whether it lives.
        """
        lock = self._state_dir / LOCK_FILE
        before = lock.read_text()
        lock.write_text(f"{self._started_ms}")
        if self._registry is None:
            return
        field = f"{MemberKind.AGENT}:{self._host.host}"
        silence_ms = NAMESAKE_BEATS * 1000 * self._settings.beat_interval_s
        last_ms = 0
        while True:
            try:
                seen = (await self._registry.fleet.members()).get(field)
            except RegistryError as error:
                _log.warning("name_not_checked", error=str(error))
                return
            if seen is None or f"{seen.member.started_ms}" == before:
                return
            if seen.seen_ms_ago > silence_ms:
                return
            if seen.seen_ms_ago < last_ms:
                raise EngineError(
                    f"another agent is the host {self._host.host!r} already (pid "
                    f"{seen.member.pid} there, {seen.member.admin_url}): stop it, or give this "
                    "one a name of its own by REDMESH_HOST_NAME"
                )
            last_ms = seen.seen_ms_ago
            await asyncio.sleep(NAMESAKE_POLL_S)

    async def _connect_later(self) -> None:
        while self._registry is None:
            await asyncio.sleep(RECONNECT_S)
            with contextlib.suppress(RegistryUnavailableError):
                self._registry = await open_registry(self._settings)
        self.keeper.connect(self._registry)
        self._wake.set()

    async def _stop_engines(self, member: Member) -> None:
        engines = self.keeper.engines.values()
        longest_s = max((e.order.spec.engine.shutdown_timeout_s for e in engines), default=0)
        self.keeper.leave()
        self._remembering.forget()
        try:
            async with asyncio.timeout(self._settings.exit_drain_s + longest_s + 2 * TEARDOWN_S):
                await self.keeper.empty.wait()
        except TimeoutError:
            _log.error("engines_left", rids=sorted(self.keeper.engines))
        if self._registry is not None:
            with contextlib.suppress(RegistryError):
                await self._registry.fleet.forget_member(member.field)

    def _admin(self) -> AdminServer:
        routes = {
            **health_routes(self._unready),
            **metrics_route(self._telemetry.registry),
            "/live/engines": self._engines,
        }
        return AdminServer(self._settings.admin_host, self._settings.admin_port, routes)

    def _unready(self) -> str | None:
        if self.keeper.online:
            return None
        return "Redis does not answer: engines go on, orders wait"

    def _engines(self) -> Answer:
        return json_answer(
            {
                "host": self._host.host,
                "engines": {
                    rid: {
                        "model": engine.order.model,
                        "gen": engine.order.gen,
                        "phase": engine.phase.value,
                        "reason": engine.reason,
                        "pid": engine.view().pid,
                        "url": engine.endpoint.url,
                        "running": engine.load.running,
                        "waiting": engine.load.waiting,
                        "restarts": engine.restarts,
                    }
                    for rid, engine in self.keeper.engines.items()
                },
            }
        )

    def _member(self, admin_url: str) -> Member:
        return Member(
            kind=MemberKind.AGENT,
            id=self._host.host,
            host=self._host.host,
            pid=os.getpid(),
            version=importlib.metadata.version("redmesh"),
            started_ms=self._started_ms,
            admin_url=admin_url,
        )


@contextlib.contextmanager
def only_agent_of(state_dir: Path) -> Generator[None]:
    """Hold the lock of `state_dir`; raise `EngineError` if another agent holds it.

    Two agents on one state directory would adopt each other's engines. The lock ends with the
    process, however that dies, and engines do not inherit it.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(state_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise EngineError(
            f"state_dir {str(state_dir)!r} cannot be written: {error.strerror}; "
            "set REDMESH_STATE_DIR to a folder that can"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise EngineError(
            f"another agent works in state_dir {str(state_dir)!r}: stop it, or give this one "
            "its own by REDMESH_STATE_DIR"
        ) from None
    try:
        yield
    finally:
        os.close(lock)


def _surroundings(settings: AgentSettings, environ: Mapping[str, str], host: Host) -> Surroundings:
    return Surroundings(
        engine_python=settings.engine_python_path,
        engine_python_usable=usable(settings.engine_python_path),
        engine_host=settings.engine_host,
        fleet_secret=settings.fleet_secret,
        environ=dict(environ),
        source_root=Path(services.__path__[0]).parent,
        gpu_memory_bytes={gpu.index: gpu.memory_bytes for gpu in host.gpus},
    )
