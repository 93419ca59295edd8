"""Injects partitions, and a failover of Redis, into a mesh that was started with `up --links`.

A failover needs a replica: the drill starts one, lets it catch up, promotes it without the last
writes, makes the old primary its replica, and sends new connections there. Connections that are
open stay at the old primary, which is read-only now, as behind the address of a managed Redis.
Afterwards everything goes back to where it was.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import time
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from services.cli import linkwish, processes, redisserver
from services.cli.drill.catalogue import Drill, Fault
from services.cli.drill.injection import Injection, cannot
from services.cli.drill.local import struck_member
from services.cli.drill.records import Struck
from services.cli.drill.scene import Scene
from services.cli.link import Cut
from services.cli.statedir import Mesh, StateDir
from shared.errors import RedmeshError, RegistryError
from shared.models.host import MemberKind
from shared.registry.connection import Connection, connect
from shared.secret import Secret
from shared.settings import CommonSettings

FAULTS: Final = frozenset({Fault.CUT_PROXY_REDIS, Fault.CUT_PROXY_REPLICA, Fault.REDIS_FAILOVER})
SYNC_S: Final = 15.0
LAG_S: Final = 0.3
"""How far the replica lags behind when it is promoted: these writes are lost."""
SLACK_S: Final = 10.0
"""How much longer than it should a cut may last if the drill dies."""


def has_links(scene: Scene) -> bool:
    """Tell whether this mesh was started with `up --links`."""
    return scene.mesh is not None and processes.alive(scene.mesh.running.get("links"))


async def prepare(drill: Drill, scene: Scene, hold_s: float) -> Injection:
    """Make the fault ready."""
    mesh, state = scene.mesh, scene.state
    if mesh is None or state is None or not has_links(scene):
        raise cannot(
            drill,
            "it was started without links, and a partition cannot be made of signals: start it "
            "with `redmesh up --links`",
        )
    match drill.fault:
        case Fault.REDIS_FAILOVER:
            return await _Failover(mesh, state).prepare()
        case Fault.CUT_PROXY_REDIS:
            proxy = scene.victim_proxy()
            cut = Cut(link=_redis_link(state), pids=(proxy.pid,))
            told = f"silence between the proxy {proxy.id} and Redis"
            return _cut(state, cut, told, struck_member(proxy), hold_s)
        case _:
            replica = scene.victim_replica()
            pids = tuple(member.pid for member in scene.of(MemberKind.PROXY))
            cut = Cut(link=urlsplit(replica.url).netloc, pids=pids)
            told = f"silence between all proxies and {replica.rid} ({replica.url})"
            struck = Struck(replicas=frozenset({replica.rid}))
            return _cut(state, cut, told, struck, hold_s)


def _cut(state: StateDir, cut: Cut, told: str, struck: Struck, hold_s: float) -> Injection:
    async def strike() -> None:
        await linkwish.tell(state, cuts=(cut,), redis=_redis_of(state), hold_s=hold_s + SLACK_S)

    async def heal() -> None:
        await linkwish.tell(state, cuts=(), redis=_redis_of(state))

    return Injection(told, struck, strike, heal=heal)


def _redis_of(state: StateDir) -> tuple[str, int] | None:
    return linkwish.read(state).redis


def _redis_link(state: StateDir) -> str:
    return urlsplit(state.read_redis_url() or "").netloc.rpartition("@")[2]


class _Failover:
    """A failover of the mesh's own Redis to a replica that the drill runs."""

    def __init__(self, mesh: Mesh, state: StateDir) -> None:
        self._mesh = mesh
        self._state = state
        self._password = state.redis_password_file.read_text(encoding="utf-8").strip()
        self._port = redisserver.free_port()
        self._folder = state.redis / f"replica-{secrets.token_hex(3)}"
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = contextlib.AsyncExitStack()

    async def prepare(self) -> Injection:
        """Start the replica and let it catch up."""
        try:
            await asyncio.to_thread(self._start)
            old = await self._connect(self._mesh.redis_port)
            new = await self._connect(self._port)
            await _follow(new, self._mesh.redis_port)
        except BaseException:
            await self._end()
            raise

        async def strike() -> None:
            await new.command("REPLICAOF", "NO", "ONE")
            await asyncio.sleep(LAG_S)
            await old.command("REPLICAOF", "127.0.0.1", self._port)
            await linkwish.tell(self._state, cuts=(), redis=("127.0.0.1", self._port))

        async def restore() -> None:
            try:
                if _redis_of(self._state) is not None:
                    await _caught_up(old)
                    await old.command("REPLICAOF", "NO", "ONE")
                    await linkwish.tell(self._state, cuts=(), redis=None)
                    await new.command("REPLICAOF", "127.0.0.1", self._mesh.redis_port)
            finally:
                await self._end()

        told = (
            f"a replica of Redis (port {self._port}) is promoted without the writes of the last "
            f"{LAG_S:g} s, and the old primary (port {self._mesh.redis_port}) made its replica"
        )
        return Injection(told, Struck(), strike, restore=restore)

    def _start(self) -> None:
        self._folder.mkdir(mode=0o700)
        configuration = self._folder / "redis.conf"
        lines = (
            "bind 127.0.0.1",
            f"port {self._port}",
            f"requirepass {self._password}",
            f"masterauth {self._password}",
            f'dir "{self._folder}"',
            'save ""',
            "repl-diskless-sync-delay 0",
            "maxmemory-policy noeviction",
        )
        self._state.write_secret(configuration, "\n".join(lines))
        with Path(self._state.log("redis-replica")).open("ab") as log:
            self._process = subprocess.Popen(
                [redisserver.find_program(), configuration],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, processes.MARK: self._mesh.id},
                start_new_session=True,
            )

    async def _connect(self, port: int) -> Connection:
        url = Secret(f"redis://:{self._password}@127.0.0.1:{port}/0")
        until_s = time.monotonic() + SYNC_S
        while True:
            try:
                made = await connect(CommonSettings(redis_url=url))
            except RegistryError:
                if time.monotonic() >= until_s:
                    raise
                await asyncio.sleep(0.1)
                continue
            self._stack.push_async_callback(made.aclose)
            # A replica of the old primary needs its password, and the other way round.
            await made.command("CONFIG", "SET", "masterauth", self._password)
            return made

    async def _end(self) -> None:
        await self._stack.aclose()
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(self._process.wait, 10)


async def _follow(connection: Connection, port: int) -> None:
    await connection.command("REPLICAOF", "127.0.0.1", port)
    await _caught_up(connection)


async def _caught_up(connection: Connection) -> None:
    """Wait until a replica has all that its primary has."""
    until_s = time.monotonic() + SYNC_S
    while True:
        reply = await connection.command("ROLE")
        if reply[0] == b"slave" and reply[3] == b"connected":
            return
        if time.monotonic() >= until_s:
            raise RedmeshError(f"a replica of Redis did not catch up within {SYNC_S:g} s")
        await asyncio.sleep(0.05)
