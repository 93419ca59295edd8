"""The state directory of one mesh on this machine: what runs, where, and the secrets of it.

    mesh.json        what was started: plan, processes (written by `up`, then by the supervisor)
    redis-url        URL of the mesh's Redis, with its password (mode 0600)
    redis-password   the password alone, for redis-cli (0600; only for a Redis that we started)
    fleet-secret     engine API keys are derived from it (0600)
    redis/           configuration and data of the Redis that we started
    links.json       what a drill wants the links to be (only with `up --links`)
    logs/            one file per process
    agent-<host>/    an agent's state: its engines' process records and logs
    proxy-<n>/       a proxy's state: its routing table

Two meshes live side by side in two state directories. The directory itself has mode 0700.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Final

import msgspec

from services.cli.processes import ProcessRef, alive
from services.cli.supervisor import ChildSpec
from shared.errors import InvalidInputError, RedmeshError

DEFAULT: Final = Path(".redmesh")


class Mesh(msgspec.Struct, frozen=True, kw_only=True):
    """What one `redmesh up` started: the content of `mesh.json`. Holds no secret."""

    id: str
    """Carried by every process of the mesh in its environment."""
    version: str
    detached: bool
    created_ms: int
    children: tuple[ChildSpec, ...]
    proxy_urls: tuple[str, ...]
    hosts: tuple[str, ...]
    """Names of the hosts that its agents stand for."""
    redis_port: int = 0
    """0: the Redis is not ours."""
    supervisor: ProcessRef | None = None
    running: dict[str, ProcessRef] = msgspec.field(default_factory=dict[str, ProcessRef])


class StateDir:
    """Paths and files of one state directory."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.mesh_file = self.path / "mesh.json"
        self.redis_url_file = self.path / "redis-url"
        self.redis_password_file = self.path / "redis-password"
        self.fleet_secret_file = self.path / "fleet-secret"
        self.redis = self.path / "redis"
        self.logs = self.path / "logs"

    def agent(self, host: str) -> Path:
        """Name the state directory of one agent."""
        return self.path / f"agent-{host}"

    def proxy(self, number: int) -> Path:
        """Name the state directory of one proxy."""
        return self.path / f"proxy-{number}"

    def log(self, name: str) -> Path:
        """Name the log file of one process."""
        return self.logs / f"{name}.log"

    def prepare(self) -> None:
        """Make the directories; raise `InvalidInputError` when the place cannot be used."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise InvalidInputError(
                f"--state-dir {self.path}: {error.strerror}: choose a folder that you may write",
                field="--state-dir",
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Generator[None]:
        """Keep a second `up` out of this directory while the first prepares it."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._in_use("another redmesh up is starting") from None
            yield
        finally:
            os.close(descriptor)

    def check_unused(self) -> None:
        """Raise `InvalidInputError` when a mesh, or a rest of one, runs from this directory."""
        mesh = self.read_mesh()
        if mesh is None:
            return
        if alive(mesh.supervisor):
            pid = mesh.supervisor.pid if mesh.supervisor else 0
            raise self._in_use(f"a mesh runs from it (supervisor pid {pid})")
        left = sorted(name for name, ref in mesh.running.items() if alive(ref))
        if left:
            raise self._in_use(f"processes of an earlier mesh still run: {', '.join(left)}")

    def _in_use(self, why: str) -> InvalidInputError:
        return InvalidInputError(
            f"--state-dir {self.path} is in use: {why}. End it with "
            f"`redmesh down --state-dir {self.path}`, or choose another --state-dir (and --port)",
            field="--state-dir",
        )

    def read_mesh(self) -> Mesh | None:
        """Read `mesh.json`; None when there is none."""
        try:
            return msgspec.json.decode(self.mesh_file.read_bytes(), type=Mesh)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RedmeshError(
                f"{self.mesh_file} cannot be read ({error}): look for processes with "
                "`ps aux | grep services.cli`, end them, and delete the file"
            ) from error

    def write_mesh(self, mesh: Mesh) -> None:
        """Replace `mesh.json` atomically."""
        self._write(self.mesh_file, msgspec.json.format(msgspec.json.encode(mesh), indent=2))

    def write_secret(self, path: Path, text: str) -> None:
        """Write a file that only its owner may read, atomically."""
        self._write(path, text.encode() + b"\n")

    def ensure_fleet_secret(self) -> None:
        """Make the fleet secret unless there is one."""
        if not self.fleet_secret_file.exists():
            self.write_secret(self.fleet_secret_file, secrets.token_hex(32))

    def read_redis_url(self) -> str | None:
        """Read the URL of the mesh's Redis; None when no mesh runs from this directory."""
        try:
            return self.redis_url_file.read_text(encoding="utf-8").strip()
        except OSError:
            return None

    def clear_run_files(self) -> None:
        """Remove what describes a run that is over. Logs, agents' state and secrets stay."""
        for path in (self.mesh_file, self.redis_url_file, self.redis_password_file):
            path.unlink(missing_ok=True)
        for name in ("links.json", "links.seen"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.redis, ignore_errors=True)

    def _write(self, path: Path, content: bytes) -> None:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        temporary.replace(path)
