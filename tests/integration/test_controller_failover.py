"""The leading controller is killed or frozen in the middle of its work; the standby takes over.

Whatever the leader was at (rolling, scaling, replacing), another one acts within one and a half
lease times, the declared state is reached, and neither an engine nor an order is left over. One
that was frozen stands by when it is awake again, and does not write.
"""

import contextlib
import os
import signal
import time
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Final

import psutil
import pytest

from shared.models.event import Event
from shared.models.host import MemberKind
from shared.models.order import Order, OrderAction
from shared.models.replica import Replica, ReplicaState
from shared.registry import Registry
from tests.support.mesh import Mesh, left_behind, ready_replicas, sim_model, start, write_models
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(180)]

MODEL: Final = "sim"
REPLICAS: Final = 3
TTL_S: Final = 5.0
"""The lease that `redmesh up` gives its controllers."""
BOUND_S: Final = 1.5 * TTL_S
LIVING: Final = frozenset(
    {ReplicaState.PENDING, ReplicaState.STARTING, ReplicaState.READY, ReplicaState.UNHEALTHY}
)
STRIKES: Final = pytest.mark.parametrize(
    "strike", [signal.SIGKILL, signal.SIGSTOP], ids=lambda strike: strike.name
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Generator[Mesh]:
    """One mesh with two controllers and two hosts for every scenario of this file."""
    models = declaration(tmp_path_factory.mktemp("models"), step_ms=20)
    with start(models, proxies=1, hosts=2) as mesh:
        yield mesh


def declaration(folder: Path, *, step_ms: int, replicas: int = REPLICAS) -> Path:
    """Write a models file; another `step_ms` is another revision. Engines start slowly."""
    model = sim_model(MODEL, replicas=replicas, step_ms=step_ms, args=("--startup-delay-s", "1.5"))
    return write_models(folder / f"models-{step_ms}.json", model)


class Scene:
    """One plan under way, and what becomes of it."""

    def __init__(self, mesh: Mesh, registry: Registry) -> None:
        self.mesh = mesh
        self.registry = registry
        self.most = 0
        """Most living replicas seen at once."""
        self.struck = ""
        self.successor = ""
        self._pid = 0
        self._struck_s = 0.0
        self._struck_ms = 0

    async def replicas(self) -> dict[str, Replica]:
        """Read all records, and note how many live at once."""
        found = (await self.registry.replicas.snapshot(MODEL)).replicas
        self.most = max(self.most, sum(record.state in LIVING for record in found.values()))
        return found

    async def leader(self) -> str:
        """Read who holds the lease; empty if nobody does."""
        owner = await self.registry.connection.command(
            "HGET", self.registry.keys.fleet.leader, "id"
        )
        return owner.decode() if owner else ""

    async def strike(self, number: signal.Signals) -> None:
        """Kill or freeze the leader."""
        self.struck = await self.leader()
        member = (await self.registry.fleet.members())[f"{MemberKind.CONTROLLER}:{self.struck}"]
        self._pid = member.member.pid
        self._struck_s, self._struck_ms = time.monotonic(), time.time_ns() // 1_000_000
        os.kill(self._pid, number)

    async def followed(self, what: str) -> None:
        """Wait until another controller acts, and print how long that took."""

        async def elected() -> bool:
            await self.replicas()
            self.successor = await self.leader()
            return self.successor not in {"", self.struck}

        await wait_until(elected, timeout_s=2 * BOUND_S, what="another controller leads")
        led_s = time.monotonic() - self._struck_s
        await wait_until(self._acted, timeout_s=2 * BOUND_S, what="it acts")
        acted_s = time.monotonic() - self._struck_s
        print(f"\n{what}: followed after {led_s:.2f} s, acted on after {acted_s:.2f} s")  # noqa: T201 - figures for the reader
        assert acted_s < BOUND_S

    async def ends_with(self, count: int, step_ms: int) -> None:
        """Wait until `count` replicas of one revision are READY and nothing else is there."""

        async def reached() -> bool:
            records = await self.replicas()
            orders = await self.orders()
            ready = {rid for rid, r in records.items() if r.state is ReplicaState.READY}
            living = {rid for rid, r in records.items() if r.state is not ReplicaState.FAILED}
            return (
                ready == living
                and len(ready) == count
                and ready == {o.rid for o in orders if o.action is OrderAction.RUN}
                and {step_of(o) for o in orders if o.rid in ready} == {step_ms}
                and {o.rid for o in orders} <= set(records)
                and all(o.gen == records[o.rid].gen for o in orders)
            )

        await wait_until(reached, timeout_s=60, interval_s=0.1, what=f"{count} READY replicas")
        pids = {record.pid for record in (await ready_replicas(self.registry, MODEL)).values()}
        await wait_until(lambda: engines(self.mesh) == pids, what="no other engine runs")

    async def thawed(self, number: signal.Signals) -> None:
        """Let a frozen leader go on: it stands by, and changes nothing."""
        before = await self.replicas()
        if number is signal.SIGSTOP:
            os.kill(self._pid, signal.SIGCONT)
        await wait_until(self.complete, timeout_s=30, what="two controllers beat")
        assert await self.leader() == self.successor
        assert await self.replicas() == before
        late = [e for e in await self._events() if e.source == f"controller/{self.struck}"]
        assert late == []

    async def _acted(self) -> bool:
        await self.replicas()
        source = f"controller/{self.successor}"
        events = await self._events()
        return any(e.source == source and e.kind != "LeaderElected" for e in events)

    async def _events(self) -> list[Event]:
        events = await self.registry.fleet.events(200)
        return [event for event in events if event.at_ms > self._struck_ms]

    async def orders(self) -> list[Order]:
        """Read the orders to all hosts."""
        hosts = await self.registry.fleet.hosts()
        return [o for name in hosts for o in (await self.registry.fleet.orders(name)).values()]

    async def complete(self) -> bool:
        """Tell whether two controllers beat."""
        members = (await self.registry.fleet.members()).values()
        beating = {
            seen.member.id
            for seen in members
            if seen.member.kind is MemberKind.CONTROLLER and seen.seen_ms_ago < 2_000
        }
        return len(beating) == 2


def step_of(order: Order) -> int:
    """Read from an order which revision it runs."""
    args = order.spec.engine.args
    return int(args[args.index("--step-ms") + 1])


def engines(mesh: Mesh) -> set[int]:
    """Find the engine processes of the mesh."""
    found: set[int] = set()
    for process in left_behind(mesh.mark):
        with contextlib.suppress(psutil.Error):
            if "services.simengine" in process.cmdline():
                found.add(process.pid)
    return found


@contextlib.asynccontextmanager
async def scene(mesh: Mesh) -> AsyncGenerator[Scene]:
    """Begin with two controllers, one of which leads."""
    async with mesh.registry() as registry:
        opened = Scene(mesh, registry)
        await wait_until(opened.complete, timeout_s=30, what="two controllers beat")
        await wait_until(opened.leader, what="one leads")
        yield opened


@STRIKES
async def test_rolling_goes_on_under_another_leader(
    running: Mesh, tmp_path: Path, strike: signal.Signals
) -> None:
    """Struck when the first replica of a new revision starts: the standby rolls all the others."""
    step_ms = 21 if strike is signal.SIGKILL else 22
    async with scene(running) as taken:
        before = set(await taken.replicas())
        done = await running.ask("apply", "-f", declaration(tmp_path, step_ms=step_ms))
        assert done.code == 0, done

        async def begun() -> bool:
            return bool(set(await taken.replicas()) - before)

        await wait_until(begun, what="a replica of the new revision")
        await taken.strike(strike)
        await taken.followed(f"rolling, {strike.name}")
        await taken.ends_with(REPLICAS, step_ms)
        await taken.thawed(strike)
        assert taken.most <= REPLICAS + 1


@STRIKES
async def test_a_dead_replica_is_replaced_by_another_leader(
    running: Mesh, strike: signal.Signals
) -> None:
    """Struck when a replica has FAILED and its successor is due: the standby makes just one."""
    async with scene(running) as taken:
        ready = await ready_replicas(taken.registry, MODEL)
        victim = next(iter(ready.values()))
        (step_ms,) = {step_of(order) for order in await taken.orders() if order.rid == victim.rid}
        os.kill(victim.pid, signal.SIGKILL)

        async def failed() -> bool:
            return (await taken.replicas())[victim.rid].state is ReplicaState.FAILED

        await wait_until(failed, what="the replica has FAILED")
        await taken.strike(strike)
        await taken.followed(f"replacing, {strike.name}")
        await taken.ends_with(REPLICAS, step_ms)
        await taken.thawed(strike)
        assert taken.most == REPLICAS


async def test_scaling_goes_on_under_another_leader(running: Mesh) -> None:
    """Struck in scaling up, and again in scaling down: what was asked for is what runs."""
    async with scene(running) as taken:
        (step_ms,) = {step_of(order) for order in await taken.orders()}
        await running.ask("scale", MODEL, str(REPLICAS + 2))

        async def begun() -> bool:
            return len(await taken.replicas()) > REPLICAS

        await wait_until(begun, what="another replica")
        await taken.strike(signal.SIGSTOP)
        await running.ask("scale", MODEL, str(REPLICAS + 3))
        await taken.followed("scaling up, SIGSTOP")
        await taken.ends_with(REPLICAS + 3, step_ms)
        await taken.thawed(signal.SIGSTOP)
        assert taken.most <= REPLICAS + 4
    async with scene(running) as taken:
        await taken.strike(signal.SIGKILL)
        await running.ask("scale", MODEL, str(REPLICAS))
        await taken.followed("scaling down, SIGKILL")
        await taken.ends_with(REPLICAS, step_ms)
        await taken.thawed(signal.SIGKILL)
