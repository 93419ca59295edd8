"""Random faults at random times under load: nothing is lost, nothing leaks, nothing grows.

`SOAK_S` says for how long (45 s unless told otherwise, `SOAK_S=1800` for half an hour) and
`SEED` which faults come when; both are printed.
"""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Generator
from typing import Final

import psutil
import pytest

from shared.errors import RegistryError
from shared.registry import Registry
from tests.support.mesh import MARK, Mesh, ready_replicas, sim_model, start, write_models
from tests.support.streams import Load
from tests.support.verdicts import Outcome
from tests.support.waiting import wait_until

SOAK_S: Final = float(os.environ.get("SOAK_S", "45"))
SEED: Final = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(1, 10**6)

pytestmark = [pytest.mark.mesh, pytest.mark.load, pytest.mark.timeout(SOAK_S + 240)]

MODEL: Final = "enduring"
REPLICAS: Final = 3
USERS: Final = 40
TOKENS: Final = 60
SETTLED_S: Final = 45.0
"""How long the mesh may take to be whole after any one fault: an agent that was killed beside a
leader that was, and a replica to start."""
NOTICED_S: Final = 1.0
"""How long the mesh may take to notice; before that it looks whole."""
GROWTH_BYTES: Final = 40 << 20
"""What a process may hold more at the end than at the start: warm caches, not a leak."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Generator[Mesh]:
    """Serve streams of three seconds that notice a frozen replica after two."""
    model = sim_model(MODEL, replicas=REPLICAS, step_ms=50)
    model["routing"]["inter_byte_timeout_s"] = 2.0
    models = write_models(tmp_path_factory.mktemp("models") / "models.json", model)
    with start(models, engine="sim") as mesh:
        yield mesh


class Faults:
    """The kinds of faults, each a method that strikes once and undoes what does not undo itself."""

    def __init__(self, mesh: Mesh, registry: Registry, source: random.Random) -> None:
        self._mesh = mesh
        self._registry = registry
        self._source = source
        self.struck_ports: set[int] = set()
        """Ports of proxies that were killed: their begun streams are lost with them."""

    def kinds(self) -> list[Callable[[], Awaitable[None]]]:
        """List them all."""
        return [
            self.replica_killed,
            self.replica_frozen,
            self.agent_killed,
            self.leader_killed,
            self.leader_frozen,
            self.redis_killed,
            self.redis_frozen,
            self.redis_emptied,
            self.scripts_flushed,
            self.connections_cut,
            self.proxy_killed,
            self.proxy_drained,
            self.scaled,
        ]

    async def _replica(self) -> int:
        ready = await ready_replicas(self._registry, MODEL)
        return self._source.choice(sorted(replica.pid for replica in ready.values()))

    async def replica_killed(self) -> None:
        """Kill an engine."""
        os.kill(await self._replica(), signal.SIGKILL)

    async def replica_frozen(self) -> None:
        """Stop an engine for some seconds."""
        await self._frozen(await self._replica(), self._source.uniform(3, 6))

    async def agent_killed(self) -> None:
        """Kill the agent; its engines run on."""
        self._mesh.kill("agent-local-1")

    async def leader_killed(self) -> None:
        """Kill the leading controller."""
        self._mesh.kill(await self._leader())

    async def leader_frozen(self) -> None:
        """Stop the leading controller for longer than its lease."""
        await self._frozen(self._mesh.pid(await self._leader()), 8.0)

    async def redis_killed(self) -> None:
        """Kill Redis; it comes back with its data."""
        self._mesh.kill("redis")

    async def redis_frozen(self) -> None:
        """Stop Redis for some seconds."""
        await self._frozen(self._mesh.pid("redis"), self._source.uniform(1, 4))

    async def redis_emptied(self) -> None:
        """Take everything from Redis."""
        await self._registry.connection.command("FLUSHALL")

    async def scripts_flushed(self) -> None:
        """Take the scripts from Redis."""
        await self._registry.connection.command("SCRIPT", "FLUSH")

    async def connections_cut(self) -> None:
        """Cut every connection to Redis."""
        with contextlib.suppress(RegistryError):  # our own is among them
            await self._registry.connection.command("CLIENT", "KILL", "TYPE", "normal")

    async def proxy_killed(self) -> None:
        """Kill a proxy: what it had begun is lost, and nothing else."""
        name = self._source.choice(["proxy-0", "proxy-1"])
        self.struck_ports.add(self._mesh.ports[int(name[-1])])
        self._mesh.kill(name)

    async def proxy_drained(self) -> None:
        """Tell a proxy to end: it finishes what it has."""
        os.kill(self._mesh.pid(self._source.choice(["proxy-0", "proxy-1"])), signal.SIGTERM)

    async def scaled(self) -> None:
        """Scale down and up again."""
        for count in (REPLICAS - 1, REPLICAS):
            done = await self._mesh.ask("scale", MODEL, str(count))
            assert done.code == 0, done
            await asyncio.sleep(self._source.uniform(1, 3))

    async def _leader(self) -> str:
        owner = await self._registry.connection.command(
            "HGET", self._registry.keys.fleet.leader, "id"
        )
        assert owner, "nobody leads"
        return f"controller-{owner.decode().split('controller-')[-1][0]}"

    async def _frozen(self, pid: int, seconds: float) -> None:
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


async def whole(mesh: Mesh, registry: Registry) -> bool:
    """Tell whether every process runs, every replica is READY, and somebody leads."""
    try:
        file = mesh.file()
        beating = [
            seen for seen in (await registry.fleet.members()).values() if seen.seen_ms_ago < 4000
        ]
        return (
            set(file.running) == {child.name for child in file.children}
            and len(await ready_replicas(registry, MODEL)) == REPLICAS
            and len(beating) == len(file.children) - 1
            and bool(await registry.connection.command("EXISTS", registry.keys.fleet.leader))
        )
    except RegistryError:
        return False


def memory(mesh: Mesh) -> dict[str, int]:
    """Measure the resident memory of the mesh's own processes, in bytes."""
    sizes: dict[str, int] = {}
    for name, running in mesh.file().running.items():
        with contextlib.suppress(psutil.Error):
            sizes[name] = psutil.Process(running.pid).memory_info().rss
    return sizes


def engines(mesh: Mesh) -> set[int]:
    """Find the engine processes of the mesh, whoever knows of them."""
    found: set[int] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            marked = process.environ().get(MARK) == mesh.mark
            if marked and "services.simengine" in process.cmdline():
                found.add(process.pid)
    return found


async def test_random_faults_under_load(running: Mesh) -> None:
    """No exact stream is lost, no reservation leaks, no engine is orphaned, no memory grows."""
    source = random.Random(SEED)
    print(f"\nSEED={SEED} SOAK_S={SOAK_S:g}")  # noqa: T201 - to replay
    load = Load(running.ports, MODEL, max_tokens=TOKENS, patience_s=30)
    counts: dict[str, int] = {}
    async with running.registry() as registry, load.users(USERS, over_s=3.0):
        await wait_until(lambda: load.good >= 2 * USERS, timeout_s=60, what="traffic flows")
        before = memory(running)
        faults = Faults(running, registry, source)
        until_s = time.monotonic() + SOAK_S
        bag: list[Callable[[], Awaitable[None]]] = []
        while time.monotonic() < until_s:
            # Every kind comes before one comes again.
            bag = bag or source.sample(faults.kinds(), len(faults.kinds()))
            strike = bag.pop()
            name = strike.__name__
            at_s = time.monotonic()
            await strike()
            counts[name] = counts.get(name, 0) + 1
            await asyncio.sleep(NOTICED_S)
            await wait_until(
                lambda: whole(running, registry), timeout_s=SETTLED_S, what=f"whole after {name}"
            )
            bad = load.report()
            print(f"{name}: whole after {time.monotonic() - at_s:.1f} s, {bad.ok}/{bad.count} good")  # noqa: T201
            await asyncio.sleep(source.uniform(0, 2))
        after = memory(running)
    report = load.report()
    grown = ", ".join(
        f"{name} {size >> 20} → {after.get(name, 0) >> 20} MiB" for name, size in before.items()
    )
    print(f"{counts}\n{report}\n{grown}")  # noqa: T201 - figures for the reader
    lost = [result for result in load.results if result.outcome is not Outcome.OK]
    own = [
        result
        for result in lost
        if result.outcome is Outcome.RESET and result.port in faults.struck_ports
    ]
    assert lost == own, str(report)
    assert len(own) <= USERS * counts.get("proxy_killed", 0)
    for name, size in after.items():
        assert size <= before.get(name, size) + GROWTH_BYTES, grown
    async with running.registry() as registry:

        async def clean() -> bool:
            return (await running.ask("audit")).code == 0

        await wait_until(clean, timeout_s=20, interval_s=0.5, what="the audit is clean")
        known = {replica.pid for replica in (await ready_replicas(registry, MODEL)).values()}
        await wait_until(lambda: engines(running) == known, timeout_s=20, what="no orphan engine")
