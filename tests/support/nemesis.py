"""Every kind of fault that can be brought about on a mesh of real processes behind links.

A fault is aimed first, while Redis can be asked whom to hit, and strikes later: then two can
overlap whatever they are. It undoes what does not undo itself. What it was aimed at may be gone by
then, by another fault's doing: then there is nothing to strike.
"""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Final, TypeVar
from urllib.parse import urlsplit

import msgspec

from services.cli import linkwish, processes
from services.cli.declaring import declare
from services.cli.drill import linked
from services.cli.drill.catalogue import Fault, find
from services.cli.drill.options import Target
from services.cli.drill.scene import Scene
from services.cli.link import Cut
from shared.errors import RedmeshError, RegistryError
from shared.models.replica import Replica
from shared.registry import Registry
from tests.support.mesh import Mesh, ready_replicas
from tests.support.soaking import Kill
from tests.support.streams import Load
from tests.support.waiting import wait_until

PATIENCE_S: Final = 30.0
"""For how long an aim, or an operator's command, is tried again while Redis is away."""
REMEMBERED_S: Final = 4.0
"""What is declared is remembered by controllers within a second, and by agents within two. Data
that are lost earlier are lost: this is no fault of the mesh, so nothing takes them earlier."""
AGENT_SILENT_S: Final = (3.0, 12.0)
"""Below and above the ten seconds after which the leader asks the engines itself."""
PROXY_SILENT_S: Final = (2.0, 10.0)
"""Below and above the seven after which its reservations are dropped."""
LEADER_SILENT_S: Final = 8.0
"""Longer than the lease."""

MEMORY: Final = "256mb"
"""What `redmesh up` gives its Redis."""

Strike = Callable[[], Awaitable[None]]
T = TypeVar("T")

_NOTHING: Final = frozenset[str]()
_REDIS: Final = frozenset({"redis"})
_LINKS: Final = frozenset({"links"})
_DATA: Final = frozenset({"data"})

TAKES: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "replica_killed": _NOTHING,
        "replica_frozen": _NOTHING,
        "replica_apart": _LINKS,
        "host_lost": _NOTHING,
        "agent_killed": _NOTHING,
        "agent_frozen": _NOTHING,
        "agent_apart": _LINKS,
        "leader_killed": _NOTHING,
        "leader_frozen": _NOTHING,
        "leader_apart": _LINKS,
        "proxy_killed": _NOTHING,
        "proxy_frozen": _NOTHING,
        "proxy_drained": _NOTHING,
        "proxy_apart": _LINKS,
        "redis_killed": _REDIS,
        "redis_frozen": _REDIS,
        "redis_full": _REDIS,
        "redis_emptied": _REDIS | _DATA,
        "redis_failed_over": _REDIS | _LINKS | _DATA,
        "scripts_flushed": _REDIS,
        "connections_cut": _REDIS,
        "scaled": _DATA,
        "rolled": _DATA,
    }
)
"""Kind → what it takes for itself: a process of Redis, the links, or what is declared."""


class Nemesis:
    """Aims and strikes. `kills` tells which proxies were killed when."""

    def __init__(
        self, mesh: Mesh, model: str, registry: Registry, load: Load, source: random.Random
    ) -> None:
        self._mesh = mesh
        self._model = model
        self._registry = registry
        self._load = load
        self._source = source
        self._declared_s = 0.0
        self.kills: list[Kill] = []

    async def aim(self, kind: str) -> Strike:
        """Choose the victim of a fault of `kind`; returns what strikes it."""
        aim: Callable[[], Awaitable[Strike]] = getattr(self, f"_{kind}")
        return await aim()

    # replicas and hosts

    async def _replica_killed(self) -> Strike:
        pid = (await self._replica()).pid

        async def strike() -> None:
            _signal(pid, signal.SIGKILL)

        return strike

    async def _replica_frozen(self) -> Strike:
        pid = (await self._replica()).pid
        return self._freezing(lambda: pid, self._source.uniform(3, 6))

    async def _replica_apart(self) -> Strike:
        link = urlsplit((await self._replica()).url).netloc
        return self._cutting(link, ("proxy-0", "proxy-1"), self._source.uniform(3, 8))

    async def _host_lost(self) -> Strike:
        ready = await self._ready()
        host = self._source.choice(sorted({replica.host for replica in ready}))
        seconds = self._source.uniform(3, 8)

        async def strike() -> None:
            agent = self._mesh.pid(f"agent-{host}")
            _signal(agent, signal.SIGSTOP)
            try:
                for replica in ready:
                    if replica.host == host:
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(replica.pid, signal.SIGKILL)
                await asyncio.sleep(seconds)
            finally:
                _signal(agent, signal.SIGKILL)  # the host comes back with a new agent

        return strike

    # agents and controllers

    async def _agent_killed(self) -> Strike:
        return self._killing(self._agent())

    async def _agent_frozen(self) -> Strike:
        name = self._agent()
        return self._freezing(lambda: self._mesh.pid(name), self._source.uniform(*AGENT_SILENT_S))

    async def _agent_apart(self) -> Strike:
        return self._cutting("", (self._agent(),), self._source.uniform(*AGENT_SILENT_S))

    async def _leader_killed(self) -> Strike:
        return self._killing(await self._leader())

    async def _leader_frozen(self) -> Strike:
        name = await self._leader()
        return self._freezing(lambda: self._mesh.pid(name), LEADER_SILENT_S)

    async def _leader_apart(self) -> Strike:
        return self._cutting("", (await self._leader(),), LEADER_SILENT_S)

    # proxies

    async def _proxy_killed(self) -> Strike:
        """Kill a proxy: what it had begun is lost, and nothing else."""
        number = self._source.randrange(len(self._mesh.ports))

        async def strike() -> None:
            ref = processes.reference(self._mesh.pid(f"proxy-{number}"))
            if ref is None:
                return
            port = self._mesh.ports[number]
            at_s, asked = time.monotonic(), self._load.asked[port]
            _signal(ref.pid, signal.SIGKILL)
            await wait_until(lambda: not processes.alive(ref), what="a killed proxy is gone")
            self.kills.append(Kill(port, at_s, time.monotonic(), asked))

        return strike

    async def _proxy_frozen(self) -> Strike:
        name = self._proxy()
        return self._freezing(lambda: self._mesh.pid(name), self._source.uniform(*PROXY_SILENT_S))

    async def _proxy_drained(self) -> Strike:
        name = self._proxy()

        async def strike() -> None:
            _signal(self._mesh.pid(name), signal.SIGTERM)

        return strike

    async def _proxy_apart(self) -> Strike:
        return self._cutting("", (self._proxy(),), self._source.uniform(*PROXY_SILENT_S))

    # Redis

    async def _redis_killed(self) -> Strike:
        return self._killing("redis")

    async def _redis_frozen(self) -> Strike:
        return self._freezing(lambda: self._mesh.pid("redis"), self._source.uniform(1, 4))

    async def _redis_full(self) -> Strike:
        seconds = self._source.uniform(2, 5)
        command = self._registry.connection.command

        async def strike() -> None:
            await self._asked(lambda: command("CONFIG", "SET", "maxmemory", "1mb"))
            try:
                await asyncio.sleep(seconds)
            finally:
                await self._asked(lambda: command("CONFIG", "SET", "maxmemory", MEMORY))

        return strike

    async def _redis_emptied(self) -> Strike:
        await self._remembered()

        async def strike() -> None:
            await self._asked(lambda: self._registry.connection.command("FLUSHALL"))

        return strike

    async def _redis_failed_over(self) -> Strike:
        await self._remembered()
        seconds = self._source.uniform(1, 5)
        file = self._mesh.file()
        scene = Scene(
            model=self._model,
            deployment=(await self._asked(self._registry.fleet.deployments))[self._model],
            replicas={},
            members=(),
            hosts={},
            leader="",
            target=Target(),
            mesh=file,
            state=self._mesh.state,
        )
        injection = await linked.prepare(find(Fault.REDIS_FAILOVER), scene, seconds)

        async def strike() -> None:
            try:
                await injection.strike()
                await asyncio.sleep(seconds)
            finally:
                await injection.restore()

        return strike

    async def _scripts_flushed(self) -> Strike:
        async def strike() -> None:
            await self._asked(lambda: self._registry.connection.command("SCRIPT", "FLUSH"))

        return strike

    async def _connections_cut(self) -> Strike:
        async def strike() -> None:
            for kind in ("pubsub", "normal"):
                with contextlib.suppress(RegistryError):  # our own is among them
                    await self._registry.connection.command("CLIENT", "KILL", "TYPE", kind)

        return strike

    # what operators do

    async def _scaled(self) -> Strike:
        deployments = await self._asked(self._registry.fleet.deployments)
        usual = deployments[self._model].replicas
        pauses_s = [self._source.uniform(1, 3) for _ in range(2)]

        async def strike() -> None:
            for count, pause_s in zip((usual - 1, usual), pauses_s, strict=True):

                async def scaled(count: int = count) -> bool:
                    return (await self._mesh.ask("scale", self._model, str(count))).code == 0

                await wait_until(
                    scaled, timeout_s=PATIENCE_S, interval_s=0.5, what=f"scaled to {count}"
                )
                self._declared_s = time.monotonic()
                await asyncio.sleep(pause_s)

        return strike

    async def _rolled(self) -> Strike:
        spec = (await self._asked(self._registry.fleet.deployments))[self._model].spec
        # Another revision that differs in nothing that matters, and back again the next time.
        timeout_s = spec.engine.startup_timeout_s
        step_s = -1 if timeout_s % 2 else 1
        engine = msgspec.structs.replace(spec.engine, startup_timeout_s=timeout_s + step_s)
        wanted = msgspec.structs.replace(spec, engine=engine)

        async def strike() -> None:
            await self._asked(lambda: declare(self._registry, wanted))
            self._declared_s = time.monotonic()

        return strike

    # how

    def _killing(self, name: str) -> Strike:
        async def strike() -> None:
            _signal(self._mesh.pid(name), signal.SIGKILL)

        return strike

    def _freezing(self, pid_of: Callable[[], int], seconds: float) -> Strike:
        async def strike() -> None:
            pid = pid_of()
            _signal(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(seconds)
            finally:
                _signal(pid, signal.SIGCONT)

        return strike

    def _cutting(self, link: str, names: tuple[str, ...], seconds: float) -> Strike:
        """Cut processes off from what is behind `link`; empty: from Redis."""
        state = self._mesh.state
        name = link or urlsplit(self._mesh.redis_url).netloc.rpartition("@")[2]

        async def strike() -> None:
            pids = tuple(pid for each in names if (pid := self._mesh.pid(each)))
            if not pids:
                return
            cut = Cut(link=name, pids=pids)
            redis = linkwish.read(state).redis
            try:
                await linkwish.tell(state, cuts=(cut,), redis=redis, hold_s=seconds + PATIENCE_S)
                await asyncio.sleep(seconds)
            finally:
                await linkwish.tell(state, cuts=(), redis=redis)

        return strike

    # whom

    async def _ready(self) -> list[Replica]:
        """Give the replicas that are READY, once there are any."""
        found: list[Replica] = []

        async def some() -> bool:
            ready = await self._asked(lambda: ready_replicas(self._registry, self._model))
            found[:] = [ready[rid] for rid in sorted(ready)]
            return bool(found)

        await wait_until(some, timeout_s=PATIENCE_S, interval_s=0.2, what="a replica to strike")
        return found

    async def _replica(self) -> Replica:
        return self._source.choice(await self._ready())

    def _agent(self) -> str:
        return f"agent-{self._source.choice(self._mesh.file().hosts)}"

    def _proxy(self) -> str:
        return f"proxy-{self._source.randrange(len(self._mesh.ports))}"

    async def _leader(self) -> str:
        """Name the leader's process, once there is one."""
        found = b""

        async def one() -> bool:
            nonlocal found
            command = self._registry.connection.command
            key = self._registry.keys.fleet.leader
            found = await self._asked(lambda: command("HGET", key, "id")) or b""
            return bool(found)

        await wait_until(one, timeout_s=PATIENCE_S, interval_s=0.2, what="somebody leads")
        return f"controller-{found.decode().split('controller-')[-1][0]}"

    async def _remembered(self) -> None:
        """Wait until what was declared last is known to all who remember it."""
        await asyncio.sleep(max(0.0, self._declared_s + REMEMBERED_S - time.monotonic()))

    async def _asked(self, act: Callable[[], Awaitable[T]]) -> T:
        """Do something with Redis, again and again while it is away."""
        until_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                return await act()
            except RedmeshError:
                if time.monotonic() >= until_s:
                    raise
            await asyncio.sleep(0.2)


def _signal(pid: int, number: signal.Signals) -> None:
    """Signal a process; one that is down, or ended meanwhile, is not there to be struck."""
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
