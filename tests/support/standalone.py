"""Proxies without a mesh: real processes before replicas that are declared by hand.

Nobody restarts what a test kills here, and no controller or agent changes the table, so that what
a proxy does alone can be seen and measured alone.
"""

import asyncio
import signal
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any, Final

import httpx
import msgspec

from shared.models.deployment import Deployment, DeploymentSpec, EngineKind, EngineSpec
from shared.models.replica import Replica, ReplicaState
from shared.models.routing import ModelSpec
from shared.registry import Registry
from shared.registry.leadership import Leading
from shared.registry.results import Fence
from shared.registry.specs import spec_fields
from tests.support.mesh import REDMESH, ROOT, environment, free_ports
from tests.support.servers import free_port
from tests.support.waiting import wait_until

FLEET_SECRET: Final = "a fleet of one machine"
_LIFE: Final = (ReplicaState.PENDING, ReplicaState.STARTING, ReplicaState.READY)


class ProxyProcess:
    """A running proxy and where it listens."""

    def __init__(
        self, process: asyncio.subprocess.Process, port: int, admin_port: int, workers: int
    ) -> None:
        self.process = process
        self.workers = workers
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.admin = f"http://127.0.0.1:{admin_port}"

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    async def get(self, path: str, base: str = "") -> httpx.Response | None:
        """GET, from the admin port unless told otherwise; None unless it answers 200."""
        try:
            async with httpx.AsyncClient(timeout=2) as http:
                answer = await http.get((base or self.admin) + path)
        except httpx.HTTPError:
            return None
        return answer if answer.status_code == 200 else None

    async def ready(self) -> bool:
        """Ask whether it may get traffic."""
        return await self.get("/health/ready") is not None

    async def serves(self, model: str) -> bool:
        """Ask whether it knows `model` and a READY replica of it, and all its workers are up."""
        live = await self.get("/live/requests")
        page: Mapping[str, Any] = live.json() if live else {"table": {}}
        table: Mapping[str, Any] = page["table"].get(model, {})
        return (
            len(page.get("workers", [""])) == self.workers
            and ReplicaState.READY in table.get("replicas", {}).values()
        )

    async def in_flight(self, model: str) -> int:
        """Ask how many requests of `model` it carries."""
        live = await self.get("/live/requests")
        return len(live.json()["requests"].get(model, {})) if live else 0

    async def ended(self, timeout_s: float = 20.0) -> int:
        """Wait for its end; return the exit code."""
        return await asyncio.wait_for(self.process.wait(), timeout_s)


@asynccontextmanager
async def proxy(
    redis_url: str,
    *,
    prefix: Sequence[str] = (),
    log: str = "/dev/null",
    workers: int = 1,
    **settings: object,
) -> AsyncGenerator[ProxyProcess]:
    """Run `redmesh proxy` while the block runs, behind the command `prefix`; its log in `log`."""
    port, admin_port = free_port(), free_ports(1 + workers)
    given = {
        "redis_url": redis_url,
        "fleet_secret": FLEET_SECRET,
        "port": port,
        "admin_port": admin_port,
        "log_format": "json",
        "workers": workers,
        **settings,
    }
    with open(log, "ab") as output:  # noqa: ASYNC230, PTH123 - before anything runs
        process = await asyncio.create_subprocess_exec(
            *(*prefix, REDMESH, "proxy"),
            cwd=ROOT,
            env=environment({f"REDMESH_{name.upper()}": str(v) for name, v in given.items()}),
            stdout=output,
            stderr=output,
        )
    try:
        yield ProxyProcess(process, port, admin_port, workers)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def simengine(model: str, *args: str) -> AsyncGenerator[str]:
    """Run a simulated engine while the block runs; yields its URL."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.simengine", "--model", f"sim/{model}"),
        *("--served-model-name", model, "--port", str(port), *args),
        cwd=ROOT,
        env=environment(),
        stdout=asyncio.subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient() as http:

            async def answers() -> bool:
                try:
                    return (await http.get(url + "/health")).status_code == 200
                except httpx.HTTPError:
                    return False

            await wait_until(answers, timeout_s=60, what="the simulated engine listens")
        yield url
    finally:
        process.kill()
        await process.wait()


async def running_requests(url: str) -> float:
    """Read how many requests an engine runs, by its own count."""
    async with httpx.AsyncClient() as http:
        text = (await http.get(url + "/metrics")).text
    line = next(line for line in text.splitlines() if line.startswith("vllm:num_requests_running"))
    return float(line.split()[-1])


async def declare(registry: Registry, model: str, urls: Sequence[str], **spec: object) -> None:
    """Declare `model`, served by READY replicas at `urls`, as controller and agents would."""
    engine = EngineSpec(kind=EngineKind.VLLM)
    deployment = Deployment(
        spec=DeploymentSpec(name=model, engine=engine), generation=1, replicas=len(urls)
    )
    await registry.fleet.declare(model, deployment, 0)
    leading = await registry.leadership.try_lead("test", 60_000)
    assert isinstance(leading, Leading)
    fence = Fence(leading.epoch, "test")
    wanted = ModelSpec(model=model, desired_replicas=len(urls))
    wanted = msgspec.structs.replace(wanted, **spec)
    await registry.specs.write(fence, model, spec_fields(wanted))
    for number, url in enumerate(urls):
        rid = f"{model}-{number}"
        await registry.replicas.create(
            fence,
            Replica(
                rid=rid,
                model=model,
                gen=1,
                state=ReplicaState.PENDING,
                host="h",
                revision="r",
                kind=EngineKind.VLLM,
                url=url,
                max_requests=100_000,
            ),
        )
        for before, after in pairwise(_LIFE):
            await registry.replicas.transition(
                rid, model, gen=1, expect=before, to=after, patch={}, fence=None
            )
