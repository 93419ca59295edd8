"""Starts a planned mesh and waits until it serves. Everything here can be undone by `stopping`."""

import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from services.cli import meshplan, observing, processes, readiness, redisserver
from services.cli.declaring import check_names, declare
from services.cli.logs import last_lines
from services.cli.meshplan import Wish
from services.cli.session import open_quickly
from services.cli.showing import Shower
from services.cli.statedir import Mesh, StateDir
from services.cli.supervisor import ChildSpec
from shared.clock import SystemClock
from shared.errors import RedmeshError, RegistryUnavailableError
from shared.models.deployment import DeploymentSpec
from shared.models.event import Event, EventLevel
from shared.registry import Registry
from shared.secret import Secret
from shared.settings import CommonSettings

REDIS_DEADLINE_S: Final = 20.0
LOOK_INTERVAL_S: Final = 0.4
TAIL_LINES: Final = 12


class StartFailedError(RedmeshError):
    """The mesh did not come up; the text says why and where to look."""


def prepare(
    state: StateDir, wish: Wish, *, version: str, redis_url: Secret | None, detach: bool
) -> Mesh:
    """Write plan, secrets and Redis configuration into the state directory."""
    state.clear_run_files()
    state.ensure_fleet_secret()
    mesh_id = secrets.token_hex(8)
    redis_port = 0
    redis: list[ChildSpec] = []
    link: tuple[int, int] | None = None
    if redis_url is None:
        server = redisserver.prepare(state)
        redis_port = server.port
        redis.append(msgspec.structs.replace(server.child, env={processes.MARK: mesh_id}))
        if wish.links:
            link = (redisserver.free_port(), redis_port)
            redisserver.write_url(state, link[0])
    else:
        state.write_secret(state.redis_url_file, redis_url.reveal())
    plan = redis + list(
        meshplan.children(state, wish, mesh_id, own_redis=redis_url is None, redis_link=link)
    )
    mesh = Mesh(
        id=mesh_id,
        version=version,
        detached=detach,
        created_ms=SystemClock().now_ms(),
        children=tuple(plan),
        proxy_urls=meshplan.proxy_urls(wish),
        redis_port=redis_port,
        hosts=meshplan.host_names(wish, own_redis=redis_url is None),
    )
    state.write_mesh(mesh)
    return mesh


def start_supervisor(state: StateDir, mesh: Mesh) -> "subprocess.Popen[bytes]":
    """Start the supervisor in a session of its own: Ctrl-C in the terminal does not reach it."""
    arguments = [sys.executable, "-m", "services.cli", "supervise", "--state-dir", str(state.path)]
    if not mesh.detached:
        arguments += ["--foreground", str(os.getpid())]
    with state.log("supervisor").open("ab") as log:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=meshplan.supervisor_environment(),
            start_new_session=True,
        )


class Starter:
    """Brings one mesh from started processes to READY replicas."""

    def __init__(
        self,
        state: StateDir,
        mesh: Mesh,
        common: CommonSettings,
        supervisor: "subprocess.Popen[bytes]",
        shower: Shower,
    ) -> None:
        self._state = state
        self._mesh = mesh
        self._common = common
        self._supervisor = supervisor
        self._shower = shower

    async def start(self, specs: Sequence[DeploymentSpec], timeout_s: float) -> None:
        """Declare `specs` and wait until all of it serves; raise `StartFailedError` if not."""
        self._shower.now("waiting for Redis")
        registry = await self._registry()
        try:
            since_id = await observing.last_event_id(registry)
            await check_names(registry, list(specs))
            for spec in specs:
                await declare(registry, spec)
            await self._wait_ready(registry, [spec.name for spec in specs], timeout_s, since_id)
        finally:
            await registry.aclose()

    async def _registry(self) -> Registry:
        deadline_s = time.monotonic() + REDIS_DEADLINE_S
        while True:
            self._check_supervisor()
            try:
                return await open_quickly(self._common)
            except RegistryUnavailableError as error:
                if time.monotonic() < deadline_s:
                    await asyncio.sleep(0.1)
                    continue
                tail = last_lines(self._state.log("redis"), TAIL_LINES)
                raise StartFailedError(f"{error}\n{tail}".strip()) from error

    async def _wait_ready(
        self, registry: Registry, models: Sequence[str], timeout_s: float, since_id: str | None
    ) -> None:
        deadline_s = time.monotonic() + timeout_s
        told: set[str] = set()
        while True:
            self._check_supervisor()
            try:
                seen = await observing.look(
                    registry,
                    models,
                    proxy_urls=self._mesh.proxy_urls,
                    hosts=self._mesh.hosts,
                    since_id=since_id,
                )
            except RegistryUnavailableError:
                seen = None  # the supervisor starts it again; the deadline still counts
            if seen is not None:
                self._tell(seen.events, told)
                now = readiness.progress(seen)
                self._shower.now(" · ".join(now.lines))
                if now.ready:
                    return
                for model, failures in readiness.hopeless(seen).items():
                    raise StartFailedError(self._why(model, failures))
                if time.monotonic() >= deadline_s:
                    raise StartFailedError(self._overdue(timeout_s, now.lines, seen.proxies))
            elif time.monotonic() >= deadline_s:
                raise StartFailedError(f"Redis went away, and not all was ready in {timeout_s:g} s")
            await asyncio.sleep(LOOK_INTERVAL_S)

    def _tell(self, events: Sequence[Event], told: set[str]) -> None:
        for event in events:
            if event.id not in told and event.level is not EventLevel.INFO:
                self._shower.say(f"! {event.kind} {event.subject}: {event.message}")
            told.add(event.id)

    def _why(self, model: str, failures: Sequence[Event]) -> str:
        last = failures[-1]
        rid = last.subject.removeprefix("replica/")
        lines = [f"{model}: {len(failures)} replicas failed in a row. The last one: {last.message}"]
        for host in self._mesh.hosts:
            log = engine_log(self._state, host, rid)
            if log.exists():
                lines += [f"last lines of {log}:", last_lines(log, TAIL_LINES)]
        return "\n".join(lines)

    def _overdue(
        self, timeout_s: float, lines: Sequence[str], proxies: Sequence[readiness.ProxyView]
    ) -> str:
        problems = [f"  proxy {view.url} {view.problem}" for view in proxies if view.problem]
        return "\n".join(
            [
                f"not ready within {timeout_s:g} s: {' · '.join(lines)}",
                *problems,
                f"logs are in {self._state.logs}; a large model may need a longer --timeout",
            ]
        )

    def _check_supervisor(self) -> None:
        code = self._supervisor.poll()
        if code is not None:
            tail = last_lines(self._state.log("supervisor"), TAIL_LINES)
            raise StartFailedError(f"the supervisor ended with exit code {code}:\n{tail}")


def engine_log(state: StateDir, host: str, rid: str) -> Path:
    """Name the log file of a replica's engine on a host of this mesh."""
    return state.agent(host) / "engines" / rid / "engine.log"
