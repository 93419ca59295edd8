"""A fleet of one host for the agent's tests: a real Redis, a controller's pen, agents to kill."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from services.agent.statefile import EngineFile
from shared.models.deployment import DeploymentSpec, EngineKind, EngineSpec, RoutingSpec
from shared.models.order import Order, OrderAction
from shared.models.replica import Replica, ReplicaState
from shared.registry import Registry, open_registry
from shared.registry.leadership import Leading
from shared.registry.results import Fence, Written
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.servers import RedisServer
from tests.support.waiting import wait_until

HOST = "h1"
MODEL = "m"
START = (
    "import os, sys; from shared.settings import load; from services.agent.main import run;"
    "from services.agent.settings import AgentSettings;"
    "sys.exit(run(load(AgentSettings, os.environ)))"
)


SIM = EngineSpec(
    kind=EngineKind.SIM, model="some/model", shutdown_timeout_s=5, startup_timeout_s=60
)


def spec(engine: EngineSpec = SIM) -> DeploymentSpec:
    """Declare the model of these tests."""
    return DeploymentSpec(
        name=MODEL, engine=engine, routing=RoutingSpec(max_requests_per_replica=8)
    )


class AgentProcess:
    """An agent in a process of its own."""

    def __init__(self, redis_url: str, state_dir: Path, **settings: str) -> None:
        self.state_dir = state_dir
        self.environment = {
            **os.environ,
            "REDMESH_REDIS_URL": redis_url,
            "REDMESH_FLEET_SECRET": "secret-of-the-fleet",
            "REDMESH_HOST_NAME": HOST,
            "REDMESH_STATE_DIR": str(state_dir),
            "REDMESH_GPUS": "none",
            "REDMESH_METRICS_INTERVAL_S": "0.5",
            **{f"REDMESH_{name.upper()}": value for name, value in settings.items()},
        }
        state_dir.mkdir(parents=True, exist_ok=True)
        self.log = state_dir / "agent.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it (again)."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START], env=self.environment, stdout=log, stderr=log
            )

    def signal(self, number: signal.Signals) -> int:
        """Send `number` and wait for its end; returns its exit status."""
        if self._process is None:
            return 0
        self._process.send_signal(number)
        status = self._process.wait(timeout=60)
        self._process = None
        return status

    def wait(self) -> int:
        """Wait for its own end; returns its exit status."""
        assert self._process is not None
        status = self._process.wait(timeout=60)
        self._process = None
        return status

    def engine_files(self) -> dict[str, EngineFile]:
        """Read the state files it keeps."""
        found = (self.state_dir / "engines").glob("*/engine.json")
        files = [msgspec.json.decode(path.read_bytes(), type=EngineFile) for path in found]
        return {file.order.rid: file for file in files}

    def end(self) -> None:
        """Kill it and every engine it started."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
        for file in self.engine_files().values():
            if file.pid and Path(f"/proc/{file.pid}").exists():
                os.killpg(file.pid, signal.SIGKILL)


class Fleet:
    """What a controller would write, and what the world then looks like."""

    def __init__(self, registry: Registry, fence: Fence, redis: RedisServer) -> None:
        self.registry = registry
        self.fence = fence
        self.redis = redis

    @classmethod
    async def over(cls, redis: RedisServer) -> "Fleet":
        """Lead the fleet in `redis`."""
        registry = await open_registry(CommonSettings(redis_url=Secret(redis.url)))
        fleet = cls(registry, Fence(0, "test"), redis)
        await fleet.lead()
        return fleet

    async def lead(self) -> None:
        """Become the leader, after a loss of data too."""
        led = await self.registry.leadership.try_lead("test", 600_000)
        assert isinstance(led, Leading)
        self.fence = Fence(led.epoch, "test")
        await self.registry.specs.raise_fence(self.fence, MODEL)

    async def order(
        self,
        rid: str,
        declared: DeploymentSpec,
        action: OrderAction = OrderAction.RUN,
        *,
        gen: int = 1,
        url: str = "",
        drain_timeout_s: float = 180.0,
    ) -> Order:
        """Give an order."""
        order = Order(
            rid=rid,
            model=MODEL,
            gen=gen,
            action=action,
            revision="r1",
            spec=declared,
            url=url,
            drain_timeout_s=drain_timeout_s,
        )
        await self.registry.fleet.put_order(self.fence, HOST, order)
        return order

    async def create(self, rid: str, declared: DeploymentSpec, *, url: str = "") -> Order:
        """Create a replica as the controller does: the record, then the order."""
        record = Replica(
            rid=rid,
            model=MODEL,
            gen=1,
            state=ReplicaState.PENDING,
            host=HOST,
            revision="r1",
            kind=declared.engine.kind,
        )
        assert isinstance(await self.registry.replicas.create(self.fence, record), Written)
        return await self.order(rid, declared, url=url)

    async def move(self, rid: str, expect: ReplicaState, to: ReplicaState) -> None:
        """Move a record as the leader."""
        outcome = await self.registry.replicas.transition(
            rid, MODEL, gen=1, expect=expect, to=to, fence=self.fence
        )
        assert isinstance(outcome, Written)

    async def becomes(self, rid: str, state: ReplicaState, *, within_s: float = 60.0) -> None:
        """Wait until the record of `rid` is in `state`.

        Beside meshes an engine's start was seen to take more than twenty seconds.
        """

        async def is_so() -> bool:
            return await self.state(rid) is state

        await wait_until(is_so, timeout_s=within_s, interval_s=0.01, what=f"{rid} {state}")

    async def known(self, rid: str) -> Replica:
        """Read the record of `rid`, which must be there."""
        record = await self.record(rid)
        assert record is not None
        return record

    async def record(self, rid: str) -> Replica | None:
        """Read a replica's record."""
        return (await self.registry.replicas.snapshot(MODEL)).replicas.get(rid)

    async def state(self, rid: str) -> ReplicaState | None:
        """Read a replica's state; None without a record."""
        record = await self.record(rid)
        return record.state if record else None

    async def kinds(self, rid: str) -> list[str]:
        """List the kinds of events about a replica, oldest first."""
        events = await self.registry.fleet.events(1000)
        return [event.kind for event in events if event.subject == f"replica/{rid}"]
