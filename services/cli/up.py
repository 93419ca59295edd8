"""`redmesh up`: a whole mesh on this machine, from Redis to READY replicas, with one command."""

import asyncio
import importlib.metadata
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click
import msgspec

from services.cli import farewell, meshplan, modelsfile, stopping
from services.cli.meshplan import Wish
from services.cli.session import Session, common_options, open_quickly
from services.cli.showing import shower
from services.cli.starting import Starter, StartFailedError, prepare, start_supervisor
from services.cli.statedir import Mesh, StateDir
from shared import settings
from shared.errors import InvalidInputError
from shared.models.deployment import DeploymentSpec, EngineKind
from shared.secret import Secret
from shared.settings import CommonSettings

DEFAULT_MODELS: Final = Path("deploy/models/demo.json")
_POLL_S: Final = 0.2

SYNTHETIC: Final = """\
**********************************************************************
  SIMULATED ENGINES: every answer is synthetic text, no model runs.
  For real answers use --engine vllm (needs `make engine`).
**********************************************************************"""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says."""

    models: Path
    engine: str
    detach: bool
    timeout_s: float
    wish: Wish


@click.command("up")
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    default=DEFAULT_MODELS,
    show_default=True,
    metavar="FILE",
    help="Models file to serve.",
)
@click.option(
    "--engine",
    type=click.Choice(["vllm", "sim", "auto"]),
    default="auto",
    show_default=True,
    help="auto: vllm where its environment exists, else simulated engines.",
)
@click.option("--proxies", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Processes of each proxy, which share its port.",
)
@click.option("--controllers", type=click.IntRange(1, 16), default=2, show_default=True)
@click.option(
    "--hosts", type=click.IntRange(1, 16), default=1, show_default=True, help="Agents to run."
)
@click.option(
    "--port",
    type=click.IntRange(1, 65_535),
    default=8000,
    show_default=True,
    help="Port of the first proxy; the others follow it.",
)
@click.option(
    "--links",
    is_flag=True,
    help="Put links before Redis and the engines that `redmesh drill` can cut. They cost CPU.",
)
@click.option("--detach", is_flag=True, help="Return when ready; `redmesh down` ends it.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(1, 86_400),
    default=900.0,
    show_default=True,
    help="Seconds until everything must be ready.",
)
@common_options
def up_command(
    session: Session,
    *,
    models: Path,
    engine: str,
    detach: bool,
    timeout_s: float,
    links: bool,
    **counts: int,
) -> int:
    """Start Redis, controllers, agents and proxies here, and serve the models of a file.

    Uses the Redis of --redis-url or REDMESH_REDIS_URL if there is one, else runs its own: only on
    loopback, with a random password, and with data that goes when the mesh goes. Ctrl-C drains and
    stops everything that was started, and nothing else.
    """
    wish = Wish(links=links, **counts)
    options = Options(models=models, engine=engine, detach=detach, timeout_s=timeout_s, wish=wish)
    specs = modelsfile.read(models)
    kind = meshplan.choose_engine(engine, os.environ) if _needs_engine(specs) else None
    if kind is EngineKind.SIM:
        specs = meshplan.with_engine(specs, kind)
    state = session.state
    state.prepare()
    with state.locked():
        state.check_unused()
        meshplan.check_ports(wish)
        redis_url = _external_redis(session)
        if wish.links and redis_url is not None:
            raise InvalidInputError(
                "--links: only with the Redis that `redmesh up` starts itself: leave out "
                "--redis-url and REDMESH_REDIS_URL",
                field="--links",
            )
        if kind is EngineKind.SIM:
            click.echo(SYNTHETIC, err=True)
        mesh = prepare(
            state,
            wish,
            version=importlib.metadata.version("redmesh"),
            redis_url=redis_url,
            detach=detach,
        )
        with _interruptible() as interrupted:
            supervisor = start_supervisor(state, mesh)
            return _Run(session, state, mesh, supervisor, options, interrupted).serve(specs)


def _needs_engine(specs: list[DeploymentSpec]) -> bool:
    return any(spec.engine.kind is EngineKind.VLLM for spec in specs)


def _external_redis(session: Session) -> Secret | None:
    """Find the Redis that the operator names, and check that it answers; None: run our own."""
    overrides: dict[str, object] = {}
    if session.redis_url is not None:
        overrides["redis_url"] = Secret(session.redis_url)
    elif not any(name in os.environ for name in ("REDMESH_REDIS_URL", "REDMESH_REDIS_URL_FILE")):
        return None
    common = settings.load(CommonSettings, os.environ, overrides)

    async def check() -> None:
        registry = await open_quickly(common)
        await registry.aclose()

    asyncio.run(check())
    return common.redis_url


class _Run:
    """One `up` from the start of the supervisor to the end of the command."""

    def __init__(
        self,
        session: Session,
        state: StateDir,
        mesh: Mesh,
        supervisor: "subprocess.Popen[bytes]",
        options: Options,
        interrupted: threading.Event,
    ) -> None:
        self._session = session
        self._state = state
        self._mesh = mesh
        self._supervisor = supervisor
        self._options = options
        self._interrupted = interrupted
        self._key_prefix = ""

    def serve(self, specs: list[DeploymentSpec]) -> int:
        """Bring it up, print what to try, and unless detached wait for the end."""
        try:
            asyncio.run(self._start(specs))
        except BaseException as error:
            self._stop()
            if isinstance(error, StartFailedError):
                print(f"redmesh up: {error}", file=sys.stderr)
                return 1
            raise
        if self._interrupted.is_set():
            self._stop()
            return 130
        print(farewell.block(self._state, self._mesh, specs, self._key_prefix))
        sys.stdout.flush()
        return 0 if self._options.detach else self._wait()

    async def _start(self, specs: list[DeploymentSpec]) -> None:
        overrides: dict[str, object] = {
            "redis_url": Secret(self._state.read_redis_url() or ""),
            "fleet_secret": Secret(""),
        }
        common = settings.load(CommonSettings, os.environ, overrides)
        self._key_prefix = common.key_prefix
        with shower() as show:
            starter = Starter(self._state, self._mesh, common, self._supervisor, show)
            starting = asyncio.ensure_future(starter.start(specs, self._options.timeout_s))
            try:
                while not starting.done() and not self._interrupted.is_set():
                    await asyncio.wait({starting}, timeout=_POLL_S)
                if starting.done():
                    starting.result()
            finally:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)

    def _wait(self) -> int:
        """Wait for Ctrl-C or for the end of the supervisor (`redmesh down` elsewhere)."""
        while not self._interrupted.wait(_POLL_S):
            code = self._supervisor.poll()
            if code is None:
                continue
            if code == 0:
                print("redmesh up: the mesh was stopped", file=sys.stderr)
                return 0
            print(
                f"redmesh up: the supervisor ended with code {code}: cleaning up", file=sys.stderr
            )
            self._stop()
            return 1
        self._stop()
        return 0

    def _stop(self) -> None:
        """Drain and stop everything; a second Ctrl-C hurries, through the supervisor."""
        print("draining and stopping … (Ctrl-C again to hurry)", file=sys.stderr)
        if self._supervisor.poll() is None:
            self._interrupted.clear()
            self._supervisor.terminate()
            while self._supervisor.poll() is None:
                if self._interrupted.wait(_POLL_S):
                    self._interrupted.clear()
                    self._supervisor.terminate()
        mesh = self._state.read_mesh()
        if mesh is not None:
            stopping.stop(self._state, mesh)
        print("stopped", file=sys.stderr)


@contextmanager
def _interruptible() -> Generator[threading.Event]:
    """Turn SIGINT, SIGTERM and SIGHUP into an event, so that no step of a stop is torn apart."""
    event = threading.Event()

    def asked(number: int, frame: object) -> None:
        del number, frame
        event.set()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, asked) for number in numbers}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
