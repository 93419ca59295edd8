"""Random faults at random times under load: nothing is lost, nothing leaks, nothing grows.

`SOAK_S` says for how long (45 s unless told otherwise, `SOAK_S=1800` for half an hour, in which
every kind comes several times) and `SEED` which faults come when; both are printed.
"""

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from typing import Final

import psutil
import pytest

from shared.errors import RegistryError
from shared.registry import Registry
from tests.support.mesh import MARK, Mesh, ready_replicas, sim_model, start, write_models
from tests.support.nemesis import TAKES, Nemesis
from tests.support.soaking import Round, lost, rounds
from tests.support.streams import Load
from tests.support.verdicts import Outcome
from tests.support.waiting import wait_until

SOAK_S: Final = float(os.environ.get("SOAK_S", "45"))
SEED: Final = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
WHOLE_S: Final = 1200.0
"""A soak of this length must have had every kind."""

pytestmark = [pytest.mark.mesh, pytest.mark.alone, pytest.mark.timeout(SOAK_S + 360)]

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
"""What a process may hold more at any time than at the start: warm caches, not a leak."""
MEASURED_EVERY_S: Final = 2.0


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Generator[Mesh]:
    """Serve streams of three seconds that notice a frozen replica after two, behind links."""
    model = sim_model(MODEL, replicas=REPLICAS, step_ms=50)
    model["routing"]["inter_byte_timeout_s"] = 2.0
    models = write_models(tmp_path_factory.mktemp("models") / "models.json", model)
    with start(models, engine="sim", hosts=2, options=("--links",)) as mesh:
        yield mesh


async def whole(mesh: Mesh, registry: Registry) -> bool:
    """Tell whether every process runs and beats, every replica is READY and as declared."""
    try:
        file = mesh.file()
        serving = [child.name for child in file.children if child.name not in {"redis", "links"}]
        beating = {
            seen.member.pid
            for seen in (await registry.fleet.members()).values()
            if seen.seen_ms_ago < 4000
        }
        deployment = (await registry.fleet.deployments())[MODEL]
        revisions = [r.revision for r in (await ready_replicas(registry, MODEL)).values()]
        leads = await registry.connection.command("EXISTS", registry.keys.fleet.leader)
    except (RegistryError, KeyError):
        return False
    running = {name: ref.pid for name, ref in file.running.items()}
    return (
        running.keys() == {child.name for child in file.children}
        and {running[name] for name in serving} == beating
        and revisions == [deployment.spec.revision()] * REPLICAS
        and deployment.replicas == REPLICAS
        and bool(leads)
    )


class Sizes:
    """The resident memory of the mesh's processes by name, the engines' as one, in bytes."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.largest: dict[str, int] = {}

    @contextlib.asynccontextmanager
    async def measured(self) -> AsyncGenerator[None]:
        """Measure again and again while the block runs, and once before and after."""
        self.first = await asyncio.to_thread(self._measure)
        task = asyncio.create_task(self._repeat())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self.last = await asyncio.to_thread(self._measure)

    def _measure(self) -> dict[str, int]:
        file = self._mesh.file()
        pids = [(name, ref.pid) for name, ref in file.running.items()]
        pids += [("supervisor", file.supervisor.pid)] if file.supervisor else []
        pids += [("engine", pid) for pid in engines(self._mesh)]
        sizes: dict[str, int] = {}
        for name, pid in pids:
            with contextlib.suppress(psutil.Error):
                sizes[name] = max(sizes.get(name, 0), psutil.Process(pid).memory_info().rss)
        for name, size in sizes.items():
            self.largest[name] = max(self.largest.get(name, 0), size)
        return sizes

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(MEASURED_EVERY_S)
            await asyncio.to_thread(self._measure)

    def grown(self) -> list[str]:
        """Name the processes that held too much at any time."""
        return [
            name
            for name, size in self.largest.items()
            if size > self.first.get(name, size) + GROWTH_BYTES
        ]

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {size >> 20} → {self.last.get(name, 0) >> 20} "
            f"(largest {self.largest[name] >> 20}) MiB"
            for name, size in sorted(self.first.items())
        )


def engines(mesh: Mesh) -> set[int]:
    """Find the engine processes of the mesh, whoever knows of them."""
    found: set[int] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            marked = process.environ().get(MARK) == mesh.mark
            if marked and "services.simengine" in process.cmdline():
                found.add(process.pid)
    return found


async def strike(nemesis: Nemesis, chosen: Round) -> None:
    """Bring a round's faults about; the second while the first may still last."""
    strikes = [await nemesis.aim(kind) for kind in chosen.kinds]

    async def later(number: int) -> None:
        await asyncio.sleep(number * chosen.gap_s)
        await strikes[number]()

    async with asyncio.TaskGroup() as group:
        for number in range(len(strikes)):
            group.create_task(later(number))


async def soak(mesh: Mesh, registry: Registry, load: Load) -> tuple[Nemesis, Counter[str]]:
    """Strike round after round until the time is over; a loss ends it at once."""
    nemesis = Nemesis(mesh, MODEL, registry, load, random.Random(f"{SEED} victims"))
    counts: Counter[str] = Counter()
    began_s = time.monotonic()
    for chosen in rounds(TAKES, SEED):
        await asyncio.sleep(chosen.pause_s)
        at_s = time.monotonic()
        if at_s - began_s > SOAK_S:
            return nemesis, counts
        name = " + ".join(chosen.kinds)
        print(f"{at_s - began_s:6.1f} s: {name}", end="", flush=True)  # noqa: T201 - to follow it
        await strike(nemesis, chosen)
        counts.update(chosen.kinds)
        struck_s = time.monotonic()
        await asyncio.sleep(NOTICED_S)
        await wait_until(
            lambda: whole(mesh, registry),
            timeout_s=SETTLED_S * len(chosen.kinds),
            interval_s=0.1,
            what=f"whole after {name}",
        )
        report = load.report()
        print(  # noqa: T201 - figures for the reader
            f" {struck_s - at_s:.1f} s, whole {time.monotonic() - struck_s:.1f} s later, "
            f"{report.ok}/{report.count} good"
        )
        bad = lost(load.results, nemesis.kills)
        assert not bad, f"SEED={SEED}: {len(bad)} lost, such as {bad[:8]}"
    raise AssertionError("rounds never end")


async def test_random_faults_under_load(running: Mesh) -> None:
    """No exact stream is lost, no reservation leaks, no engine is orphaned, no memory grows."""
    print(f"\nSEED={SEED} SOAK_S={SOAK_S:g}")  # noqa: T201 - to replay
    # With every replica dead a stream waits for new ones: longer than a test's clients usually do.
    load = Load(running.ports, MODEL, max_tokens=TOKENS, patience_s=30, timeout_s=90)
    sizes = Sizes(running)
    async with running.registry() as registry:
        try:
            async with load.users(USERS, over_s=3.0):
                await wait_until(lambda: load.good >= 2 * USERS, timeout_s=60, what="traffic flows")
                async with sizes.measured():
                    nemesis, counts = await soak(running, registry, load)
        except BaseException:
            print(running.logs(lines=60))  # noqa: T201 - half an hour must not be for nothing
            raise
        report = load.report()
        own = sum(result.outcome is not Outcome.OK for result in load.results)
        print(  # noqa: T201 - figures for the reader
            f"{counts.total()} faults: {dict(counts)}\n{report}\n{own} streams were begun on the "
            f"{len(nemesis.kills)} killed proxies\n{sizes}"
        )
        bad = lost(load.results, nemesis.kills)
        assert not bad, f"SEED={SEED}: {len(bad)} lost, such as {bad[:8]}"
        assert not sizes.grown(), sizes
        if SOAK_S >= WHOLE_S:
            assert counts.keys() == TAKES.keys(), "some kinds never came"

        async def clean() -> bool:
            return (await running.ask("audit")).code == 0

        async def empty() -> bool:
            totals = await registry.ledger.totals(MODEL)
            return all(total.requests == 0 and total.cost_tokens == 0 for total in totals.values())

        await wait_until(clean, timeout_s=20, interval_s=0.5, what="the audit is clean")
        await wait_until(empty, timeout_s=20, what="no reservation is left")
        known = {replica.pid for replica in (await ready_replicas(registry, MODEL)).values()}
        await wait_until(lambda: engines(running) == known, timeout_s=20, what="no orphan engine")
