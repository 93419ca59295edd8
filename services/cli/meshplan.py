"""What `redmesh up` will start, decided before anything is: processes, ports, engine kind.

All checks that can fail are made here, so that a refused `up` leaves nothing behind.
"""

import os
import socket
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from services.cli.processes import MARK
from services.cli.redisserver import is_free
from services.cli.statedir import StateDir
from services.cli.supervisor import ChildSpec
from shared.errors import InvalidInputError
from shared.ids import slug
from shared.models.deployment import DeploymentSpec, EngineKind

PORTS_PER_AGENT: Final = 100
_FIRST_ENGINE_PORT: Final = 18_000
_ENGINE_BLOCKS: Final = 120
"""Blocks of engine ports: 18000 to 29999, below what kernels hand out to clients."""

PROXY_STAGE, CONTROLLER_STAGE, AGENT_STAGE = 1, 2, 3
"""The order of stopping: clients' requests first, engines last."""
LINKS_STAGE: Final = 8
"""After all that use them, before Redis."""

DRAIN_TIMEOUT_S: Final = 30.0
"""How long Ctrl-C and `down` wait for the requests in flight."""


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """How many of what to start, and where."""

    port: int
    proxies: int
    controllers: int
    hosts: int
    workers: int = 1
    """Worker processes of each proxy."""
    links: bool = False
    """Put links that drills can cut between the processes, Redis and the engines."""


def engine_python(environ: Mapping[str, str]) -> Path:
    """Find the Python of the engine environment, as the agent does."""
    return Path(environ.get("REDMESH_ENGINE_PYTHON", ".engine/bin/python")).absolute()


def engine_problem(python: Path) -> str | None:
    """Tell why the engine environment cannot run vLLM; None when it can.

    Looks vLLM up without importing it, which would take many seconds.
    """
    if not python.exists():
        return f"{python} does not exist"
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} does not run: {error}"
    return None if done.returncode == 0 else f"{python} has no vLLM"


def choose_engine(wanted: str, environ: Mapping[str, str]) -> EngineKind:
    """Turn `vllm`, `sim` or `auto` into the engine kind to use."""
    if wanted == "sim":
        return EngineKind.SIM
    problem = engine_problem(engine_python(environ))
    if problem is None:
        return EngineKind.VLLM
    if wanted == "auto":
        return EngineKind.SIM
    raise InvalidInputError(
        f"--engine vllm: {problem}: run `make engine`, name another environment by "
        "REDMESH_ENGINE_PYTHON, or use --engine sim",
        field="--engine",
    )


def with_engine(specs: Sequence[DeploymentSpec], kind: EngineKind) -> list[DeploymentSpec]:
    """Make every deployment run on simulated engines if `kind` is sim, except external ones."""
    if kind is not EngineKind.SIM:
        return list(specs)
    return [
        spec
        if spec.engine.kind is EngineKind.EXTERNAL
        else msgspec.structs.replace(spec, engine=msgspec.structs.replace(spec.engine, kind=kind))
        for spec in specs
    ]


def check_ports(wish: Wish) -> None:
    """Raise `InvalidInputError` when a port of a proxy is taken or does not exist."""
    ports = range(wish.port, wish.port + wish.proxies)
    if ports[-1] > 65_535:
        raise InvalidInputError(
            f"--port {wish.port}: {wish.proxies} proxies need ports up to {ports[-1]}, and the "
            "last port is 65535: choose a lower --port",
            field="--port",
        )
    taken = [str(port) for port in ports if not is_free(port)]
    if taken:
        listed = f"port {taken[0]} is" if len(taken) == 1 else f"ports {', '.join(taken)} are"
        raise InvalidInputError(
            f"--port {wish.port}: {listed} taken: end what listens there "
            f"(`ss -ltnp 'sport = :{taken[0]}'` shows it) or choose another --port",
            field="--port",
        )


def engine_ports(state: StateDir, host: str, taken: set[int]) -> str:
    """Choose a block of free ports for the engines of one agent, such as `18300-18399`.

    The search begins at a place that depends on the state directory, so that two meshes, one of
    which has few engines yet, do not choose the same block.
    """
    start = zlib.crc32(f"{state.path}\n{host}".encode()) % _ENGINE_BLOCKS
    for step in range(_ENGINE_BLOCKS):
        first = _FIRST_ENGINE_PORT + (start + step) % _ENGINE_BLOCKS * PORTS_PER_AGENT
        if first in taken:
            continue
        if all(is_free(port) for port in range(first, first + PORTS_PER_AGENT)):
            taken.add(first)
            return f"{first}-{first + PORTS_PER_AGENT - 1}"
    raise InvalidInputError(
        "no block of 100 free ports between 18000 and 29999 for the engines: end other meshes",
        field="--hosts",
    )


def proxy_urls(wish: Wish) -> tuple[str, ...]:
    """Tell where clients reach the proxies."""
    return tuple(f"http://127.0.0.1:{wish.port + number}" for number in range(wish.proxies))


def host_names(wish: Wish, *, own_redis: bool) -> tuple[str, ...]:
    """Name the agents' hosts; in a Redis that other machines share, after this one."""
    prefix = "local" if own_redis else slug(socket.gethostname())
    return tuple(f"{prefix}-{number}" for number in range(1, wish.hosts + 1))


def children(
    state: StateDir,
    wish: Wish,
    mesh_id: str,
    *,
    own_redis: bool,
    redis_link: tuple[int, int] | None = None,
) -> tuple[ChildSpec, ...]:
    """Describe every service process of the mesh.

    With `redis_link`, the port of the link to Redis and Redis' own, there are links.
    """
    env = {
        MARK: mesh_id,
        "REDMESH_REDIS_URL_FILE": str(state.redis_url_file),
        "REDMESH_FLEET_SECRET_FILE": str(state.fleet_secret_file),
        "PYTHONUNBUFFERED": "1",
    }
    specs: list[ChildSpec] = []

    def add(name: str, stage: int, stop_timeout_s: float, *argv: str) -> None:
        specs.append(
            ChildSpec(
                name=name,
                argv=(sys.executable, "-m", "services.cli", *argv),
                env=env,
                log=str(state.log(name)),
                stage=stage,
                stop_timeout_s=stop_timeout_s,
            )
        )

    for number in range(wish.controllers):
        name = f"controller-{number}"
        add(name, CONTROLLER_STAGE, 10.0, "controller", "--controller-name", name)
    taken: set[int] = set()
    linked: list[str] = []
    for number, host in enumerate(host_names(wish, own_redis=own_redis), start=2):
        ports = engine_ports(state, host, taken)
        address = "127.0.0.1" if redis_link is None else f"127.0.0.{number}"
        linked += ["--engines", f"{address}:{ports}"]
        flags = {
            "--host-name": host,
            "--address": address,
            "--port-range": ports,
            "--state-dir": str(state.agent(host)),
            "--stop-engines-on-exit": "true",
        }
        add(
            f"agent-{host}",
            AGENT_STAGE,
            60.0,
            "agent",
            *(part for pair in flags.items() for part in pair),
        )
    if redis_link is not None:
        near, far = redis_link
        plan = ("--state-dir", str(state.path), "--redis", f"{near}:{far}", *linked)
        add("links", LINKS_STAGE, 5.0, "links", *plan)
    for number in range(wish.proxies):
        flags = {
            "--host": "127.0.0.1",
            "--port": str(wish.port + number),
            "--state-dir": str(state.proxy(number)),
            "--drain-timeout-s": f"{DRAIN_TIMEOUT_S:g}",
            "--workers": str(wish.workers),
        }
        add(
            f"proxy-{number}",
            PROXY_STAGE,
            DRAIN_TIMEOUT_S + 5.0,
            "proxy",
            *(part for pair in flags.items() for part in pair),
        )
    return tuple(specs)


def supervisor_environment() -> dict[str, str]:
    """Give the supervisor's environment: ours without secrets, which children read from files."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in {"REDMESH_REDIS_URL", "REDMESH_FLEET_SECRET", MARK}
    }
