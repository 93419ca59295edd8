"""A whole mesh of real processes for a test, driven as an operator drives it: by `redmesh`.

`start` runs `redmesh up --detach` with a state directory of its own. Everything it starts inherits
a mark in its environment, so that after `redmesh down` a test can prove that nothing was left, and
clean up if something was.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil

from services.cli import redisserver
from services.cli.statedir import Mesh as MeshFile
from services.cli.statedir import StateDir
from shared.models.replica import Replica, ReplicaState
from shared.registry import Registry, open_registry
from shared.secret import Secret
from shared.settings import PREFIX, CommonSettings
from tests.support.waiting import wait_until_sync

ROOT: Final = Path(__file__).resolve().parents[2]
REDMESH: Final = str(Path(sys.executable).parent / "redmesh")
MARK: Final = "TEST_MESH_MARK"
_FIRST_PORT, _LAST_PORT = 30_000, 32_500


class Done(msgspec.Struct, frozen=True):
    """What one run of `redmesh` came to."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"

    @property
    def clear(self) -> bool:
        """Tell whether it spoke to a person: no traceback of ours anywhere."""
        return "Traceback" not in self.out + self.err


def redmesh(
    *arguments: str | Path, env: Mapping[str, str] | None = None, timeout_s: float = 60.0
) -> Done:
    """Run the real command in the repository, with nothing of the caller's `REDMESH_*`."""
    done = subprocess.run(
        [REDMESH, *map(str, arguments)],
        cwd=ROOT,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Give a program's environment: ours without `REDMESH_*`, and `more`."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return {**ours, **(more or {})}


def free_ports(count: int) -> int:
    """Find `count` free ports in a row, outside the ranges of engines and of clients."""
    while True:
        first = random.randrange(_FIRST_PORT, _LAST_PORT)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(listening(port))
            return first


@contextlib.contextmanager
def listening(port: int = 0) -> Generator[int]:
    """Listen on a port of this machine, as a stranger would; yields the port."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        yield int(server.getsockname()[1])


def left_behind(mark: str) -> list[psutil.Process]:
    """Find the processes that carry `mark`."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def write_models(path: Path, *models: Mapping[str, Any]) -> Path:
    """Write a models file."""
    path.write_text(json.dumps({"models": models}))
    return path


def sim_model(
    name: str,
    *,
    replicas: int = 1,
    step_ms: float = 20,
    args: Sequence[str] = (),
    **fields: object,
) -> dict[str, Any]:
    """Declare a model on simulated engines that takes `step_ms` for a token."""
    return {
        "name": name,
        "engine": {
            "kind": "sim",
            "model": f"sim/{name}",
            "max_num_seqs": 512,
            "max_queued_requests": 512,
            "shutdown_timeout_s": 5,
            "args": ["--step-ms", str(step_ms), *args],
        },
        "replicas": {"count": replicas},
        "routing": {"max_requests_per_replica": 400},
        **fields,
    }


class Mesh:
    """A running mesh, as a test sees it."""

    def __init__(
        self, state_dir: Path, port: int, proxies: int, mark: str, env: Mapping[str, str]
    ) -> None:
        self.state = StateDir(state_dir)
        self.env = dict(env)
        """What an operator of this mesh has in the environment."""
        self.mark = mark
        self.ports = tuple(range(port, port + proxies))

    @property
    def urls(self) -> tuple[str, ...]:
        """Base URLs of the proxies."""
        return tuple(f"http://127.0.0.1:{port}" for port in self.ports)

    @property
    def redis_url(self) -> str:
        """URL of the mesh's Redis."""
        return self.state.redis_url_file.read_text().strip()

    def file(self) -> MeshFile:
        """Read `mesh.json`."""
        found = self.state.read_mesh()
        assert found is not None, f"no mesh in {self.state.path}"
        return found

    def pid(self, name: str) -> int:
        """Tell the pid of one process by its name in `mesh.json`; 0 while it is down."""
        running = self.file().running.get(name)
        return running.pid if running is not None else 0

    def kill(self, name: str) -> int:
        """End one process with SIGKILL, as the kernel would; returns the pid it had."""
        pid = self.pid(name)
        assert pid, f"{name} does not run"
        os.kill(pid, signal.SIGKILL)
        return pid

    def redmesh(self, *arguments: str | Path, timeout_s: float = 60.0) -> Done:
        """Run `redmesh` for this mesh."""
        where = ("--state-dir", self.state.path)
        return redmesh(*arguments, *where, env=self.env, timeout_s=timeout_s)

    async def ask(self, *arguments: str | Path, timeout_s: float = 60.0) -> Done:
        """Run `redmesh` for this mesh while the test's loop goes on."""
        return await asyncio.to_thread(self.redmesh, *arguments, timeout_s=timeout_s)

    async def get(self, what: str) -> list[dict[str, Any]]:
        """Run `redmesh get WHAT -o json`."""
        done = await self.ask("get", what, "-o", "json")
        assert done.code == 0, done
        return json.loads(done.out)

    @contextlib.asynccontextmanager
    async def registry(self) -> AsyncGenerator[Registry]:
        """Open the mesh's registry."""
        settings = CommonSettings(
            redis_url=Secret(self.redis_url),
            redis_password_file=self.env.get("REDMESH_REDIS_PASSWORD_FILE", ""),
        )
        registry = await open_registry(settings)
        try:
            yield registry
        finally:
            await registry.aclose()

    def logs(self, lines: int = 15) -> str:
        """Collect the ends of all logs, for a failure's message."""
        parts: list[str] = []
        for path in sorted(self.state.path.rglob("*.log")):
            with contextlib.suppress(OSError):
                tail = path.read_text(errors="replace").splitlines()[-lines:]
                parts.append(f"--- {path.relative_to(self.state.path)}\n" + "\n".join(tail))
        return "\n".join(parts)


async def ready_replicas(registry: Registry, model: str) -> dict[str, Replica]:
    """Read the replicas of `model` that are READY."""
    snapshot = await registry.replicas.snapshot(model)
    return {
        rid: replica
        for rid, replica in snapshot.replicas.items()
        if replica.state is ReplicaState.READY
    }


@contextlib.contextmanager
def start(
    models: Path,
    *,
    engine: str = "sim",
    proxies: int = 2,
    controllers: int = 2,
    hosts: int = 1,
    env: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    timeout_s: float = 60.0,
) -> Generator[Mesh]:
    """Run a mesh while the block runs; afterwards nothing of it may be left."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="redmesh-test-", ignore_cleanup_errors=True) as folder:
        mesh = Mesh(Path(folder) / "state", free_ports(proxies), proxies, mark, env or {})
        done = redmesh(
            *("up", "--detach", "--models", models, "--engine", engine),
            *("--port", str(mesh.ports[0]), "--timeout", str(timeout_s)),
            *("--proxies", str(proxies), "--controllers", str(controllers)),
            *("--hosts", str(hosts), "--state-dir", mesh.state.path, *options),
            env={MARK: mark, **(env or {})},
            timeout_s=timeout_s + 60,
        )
        try:
            assert done.code == 0, f"{done}\n{mesh.logs()}"
            yield mesh
        finally:
            _end(mesh)


def _end(mesh: Mesh) -> None:
    try:
        if mesh.state.mesh_file.exists():
            done = mesh.redmesh("down", timeout_s=120)
            assert done.code == 0, f"{done}\n{mesh.logs()}"
    finally:
        left = left_behind(mesh.mark)
        names = [_told(process) for process in left]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if left:
            wait_until_sync(lambda: not left_behind(mesh.mark), what="all processes ended")
    assert not names, f"`redmesh down` left behind: {names}"


def _told(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline()[:8])}"
    except psutil.Error:
        return f"{process.pid}"


@contextlib.contextmanager
def redis_server() -> Generator[str]:
    """Run a Redis server of its own, without a password; yields its URL."""
    program = redisserver.find_program()
    port = free_ports(1)
    process = subprocess.Popen(
        [str(program), "--port", str(port), "--bind", "127.0.0.1", "--save", ""],
        stdout=subprocess.DEVNULL,
        cwd=tempfile.gettempdir(),
    )
    try:
        wait_until_sync(lambda: not redisserver.is_free(port), what="Redis listens")
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(10)
