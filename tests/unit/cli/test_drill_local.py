"""Injectors of a local mesh: each strikes the right process, and only processes of that mesh."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import psutil
import pytest

from services.cli import links, linkwish, processes, redisserver
from services.cli.drill import linked, local
from services.cli.drill.catalogue import find
from services.cli.drill.injection import Injection
from services.cli.drill.options import Target
from services.cli.drill.scene import Scene
from services.cli.link import Link
from services.cli.statedir import Mesh, StateDir
from shared.errors import InvalidInputError, RegistryUnavailableError
from shared.models.deployment import Deployment, DeploymentSpec, EngineKind
from shared.models.host import Host, Member, MemberKind
from shared.models.replica import Replica, ReplicaState
from shared.registry.connection import connect
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.waiting import wait_until

MESH_ID = "drilled-mesh"
NAMES = ("a1", "a2", "c1", "c2", "p1", "p2", "r1", "r2", "redis")
KINDS = {"a": MemberKind.AGENT, "c": MemberKind.CONTROLLER, "p": MemberKind.PROXY}


class Fleet:
    """Processes that do nothing, one for each part of a mesh."""

    def __init__(self, state: StateDir) -> None:
        self.state = state
        self.processes = {name: self._start() for name in NAMES}

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"],
            env={**os.environ, processes.MARK: MESH_ID},
            start_new_session=True,
        )

    def pid(self, name: str) -> int:
        """Tell the pid of a part."""
        return self.processes[name].pid

    def status(self, name: str) -> str:
        """Tell what a part does: `sleeping`, `stopped`, `zombie`."""
        return psutil.Process(self.pid(name)).status()

    def dead(self) -> set[str]:
        """Name the parts that have ended."""
        return {name for name, process in self.processes.items() if process.poll() is not None}

    def scene(self, target: Target | None = None) -> Scene:
        """Describe the mesh."""
        running = {
            name: ref for name in NAMES if (ref := processes.reference(self.pid(name))) is not None
        }
        members = tuple(
            Member(
                kind=KINDS[name[0]],
                id=name,
                host="h",
                pid=self.pid(name),
                version="0",
                started_ms=1,
                url=f"http://127.0.0.1:{name[1]}",
            )
            for name in NAMES
            if name[0] in KINDS and name != "redis"
        )
        return Scene(
            model="m",
            deployment=Deployment(spec=DeploymentSpec(name="m"), generation=1, replicas=2),
            replicas={name: self._replica(name) for name in ("r1", "r2")},
            members=members,
            hosts={
                name: Host(host=name, address="x", cpus=1, memory_bytes=1) for name in ("a1", "a2")
            },
            leader="c2",
            target=target or Target(),
            mesh=Mesh(
                id=MESH_ID,
                version="0",
                detached=True,
                created_ms=0,
                children=(),
                proxy_urls=(),
                hosts=("a1", "a2"),
                running=running,
            ),
            state=self.state,
        )

    def _replica(self, name: str) -> Replica:
        return Replica(
            rid=name,
            model="m",
            gen=1,
            state=ReplicaState.READY,
            host=f"a{name[1]}",
            revision="x",
            kind=EngineKind.SIM,
            pid=self.pid(name),
        )


@pytest.fixture
def fleet(tmp_path: Path) -> Generator[Fleet]:
    """Run a mesh of sleepers."""
    state = StateDir(tmp_path / "state")
    state.prepare()
    state.redis.mkdir()
    made = Fleet(state)
    yield made
    for process in made.processes.values():
        process.kill()
        process.wait(10)


def prepare(fleet: Fleet, name: str, **target: str) -> Injection:
    """Make a fault ready."""
    return local.prepare(find(name), fleet.scene(Target(**target)))


@pytest.mark.parametrize(
    ("name", "target", "victims", "member"),
    [
        ("replica-kill", {}, {"r1"}, ""),
        ("replica-kill", {"replica": "r2"}, {"r2"}, ""),
        ("replica-kill", {"host": "a2"}, {"r2"}, ""),
        ("agent-kill", {}, {"a1"}, "agent:a1"),
        ("agent-kill", {"host": "a2"}, {"a2"}, "agent:a2"),
        ("proxy-kill", {}, {"p1"}, "proxy:p1"),
        ("proxy-kill", {"proxy": "http://127.0.0.1:2"}, {"p2"}, "proxy:p2"),
        ("proxy-drain", {"proxy": "p2"}, {"p2"}, "proxy:p2"),
        ("controller-failover", {}, {"c2"}, "controller:c2"),
        ("redis-restart", {}, {"redis"}, ""),
        ("host-loss", {"host": "a2"}, {"r2"}, "agent:a2"),
    ],
)
async def test_the_right_process_is_killed_and_no_other(
    fleet: Fleet, name: str, target: dict[str, str], victims: set[str], member: str
) -> None:
    """What the drill names, or the target does, ends; everything else runs on."""
    injection = prepare(fleet, name, **target)
    assert not fleet.dead(), "nothing is struck before it is asked for"
    await injection.strike()
    await wait_until(lambda: fleet.dead() == victims, what=f"{victims} ended")
    assert injection.struck.member == member
    assert (injection.struck.leader == "c2") == (name == "controller-failover")
    assert bool(injection.struck.proxy_url) == name.startswith("proxy")
    if name == "host-loss":
        assert fleet.status("a2") == psutil.STATUS_STOPPED
        await injection.heal()
        await wait_until(lambda: fleet.dead() == {"r2", "a2"}, what="the host comes back")


@pytest.mark.parametrize(
    ("name", "victim"),
    [("replica-freeze", "r1"), ("controller-freeze", "c2"), ("redis-away", "redis")],
)
async def test_what_is_frozen_is_thawed_at_most_once(fleet: Fleet, name: str, victim: str) -> None:
    """A freeze lasts until it is healed; restoring heals what nobody healed."""
    injection = prepare(fleet, name)
    assert injection.lasts
    await injection.strike()
    await wait_until(lambda: fleet.status(victim) == psutil.STATUS_STOPPED, what="frozen")
    await injection.restore()
    await wait_until(lambda: fleet.status(victim) != psutil.STATUS_STOPPED, what="thawed")
    fleet.processes[victim].send_signal(signal.SIGSTOP)
    await wait_until(lambda: fleet.status(victim) == psutil.STATUS_STOPPED, what="frozen again")
    await injection.heal()
    assert fleet.status(victim) == psutil.STATUS_STOPPED
    assert not fleet.dead()


async def test_an_emptied_redis_finds_no_file(fleet: Fleet) -> None:
    """What Redis had appended is gone before it is killed, so that its successor is empty."""
    folder = fleet.state.redis / "appendonlydir"
    folder.mkdir()
    (folder / "data").write_text("x")
    await prepare(fleet, "redis-empty").strike()
    await wait_until(lambda: fleet.dead() == {"redis"}, what="killed")
    assert not folder.exists()


async def test_a_foreign_process_is_never_struck(fleet: Fleet) -> None:
    """A pid that now belongs to somebody else is refused, whatever Redis says of it."""
    stranger = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import time; time.sleep(60)", start_new_session=True
    )
    scene = fleet.scene()
    foreign = msgspec.structs.replace(scene.replicas["r1"], pid=stranger.pid)
    scene = msgspec.structs.replace(scene, replicas={**scene.replicas, "r1": foreign})
    try:
        with pytest.raises(InvalidInputError, match="no process of the mesh"):
            local.prepare(find("replica-kill"), scene)
        assert stranger.returncode is None
    finally:
        stranger.kill()
        await stranger.wait()


@contextlib.asynccontextmanager
async def behind_a_link(state: StateDir) -> AsyncGenerator[tuple[int, CommonSettings]]:
    """Run the Redis of a mesh behind a link; yields its own port, and how to reach the link."""
    server = redisserver.prepare(state)
    port = redisserver.free_port()
    redisserver.write_url(state, port)
    process = await asyncio.create_subprocess_exec(
        *server.child.argv, stdout=asyncio.subprocess.DEVNULL
    )
    link = Link("127.0.0.1", port, ("127.0.0.1", server.port))
    running = asyncio.create_task(links.Links(state, [link]).run())
    settings = CommonSettings(redis_url=Secret(state.read_redis_url() or ""))
    try:
        await wait_until(lambda: reachable(settings), what="Redis answers")
        yield server.port, settings
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        process.kill()
        await process.wait()


async def reachable(settings: CommonSettings) -> bool:
    """Tell whether Redis answers there."""
    try:
        await (await connect(settings)).aclose()
    except RegistryUnavailableError:
        return False
    return True


async def test_a_failover_loses_the_last_writes_and_goes_back(fleet: Fleet) -> None:
    """New connections find the new primary, old ones theirs read-only; then all is as before."""
    async with behind_a_link(fleet.state) as (port, settings):
        scene = fleet.scene()
        assert scene.mesh is not None
        scene.mesh.running["links"] = scene.mesh.running["c1"]
        mesh = msgspec.structs.replace(scene.mesh, redis_port=port)
        scene = msgspec.structs.replace(scene, mesh=mesh)
        client = await connect(settings)
        await client.command("SET", "kept", "1")
        injection = await linked.prepare(find("redis-failover"), scene, 0.0)
        striking = asyncio.create_task(injection.strike())

        async def lost() -> bool:
            with contextlib.suppress(RegistryUnavailableError):
                await client.command("INCR", "lost")
            return striking.done()

        await wait_until(lost, what="struck")
        await striking
        with contextlib.suppress(RegistryUnavailableError):
            await client.command("SET", "after", "0")  # an old connection is refused, and dropped
        await client.command("SET", "after", "1")
        assert linkwish.read(fleet.state).redis != ("127.0.0.1", port)
        await injection.restore()
        with contextlib.suppress(RegistryUnavailableError):
            await client.command("PING")
        await client.aclose()
        client = await connect(settings)
        assert await client.command("GET", "kept") == b"1"
        assert await client.command("GET", "after") == b"1"
        assert (await client.command("INFO", "server"))["tcp_port"] == port
        await client.aclose()
        assert linkwish.read(fleet.state).redis is None


async def test_partitions_name_their_link_and_whom_they_cut(fleet: Fleet) -> None:
    """A proxy is cut from Redis by its own connections; a replica from those of all proxies."""
    async with behind_a_link(fleet.state):
        scene = fleet.scene()
        assert scene.mesh is not None
        scene.mesh.running["links"] = scene.mesh.running["c1"]
        injection = await linked.prepare(find("partition-proxy-redis"), scene, 5.0)
        await injection.strike()
        (cut,) = linkwish.read(fleet.state).cuts
        assert cut.link == urlsplit(fleet.state.read_redis_url() or "").netloc.partition("@")[2]
        assert cut.pids == (fleet.pid("p1"),)
        await injection.heal()
        assert linkwish.read(fleet.state).cuts == ()
        injection = await linked.prepare(find("partition-proxy-replica"), scene, 5.0)
        await injection.strike()
        (cut,) = linkwish.read(fleet.state).cuts
        assert cut.pids == (fleet.pid("p1"), fleet.pid("p2"))
        await injection.restore()


async def test_without_links_a_partition_says_how_to_get_them(fleet: Fleet) -> None:
    """Signals cannot cut anybody off: the drill is refused, with the remedy."""
    with pytest.raises(InvalidInputError, match="redmesh up --links"):
        await linked.prepare(find("partition-proxy-redis"), fleet.scene(), 5.0)
