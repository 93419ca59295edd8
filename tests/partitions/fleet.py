"""A mesh whose processes live on hosts of their own, so that any link between two can be cut.

Two proxies, two controllers, three agents with one replica each, Redis, and the clients: each on a
host of `tests.support.netns`. The test itself works on the clients' host, which no cut touches.
"""

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator, Mapping
from pathlib import Path
from typing import Final

import httpx

from services.cli import redisserver
from services.cli.observing import LiveReport, live_report, members
from shared import admin
from shared.models.host import Member, MemberKind
from shared.models.replica import Replica
from shared.registry import Registry, open_registry
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.mesh import Done, environment, ready_replicas, sim_model, write_models
from tests.support.netns import Network, popen
from tests.support.waiting import wait_until_sync

MODEL: Final = "sim"
STEP_MS: Final = 40.0
PROXIES: Final = {"px-0": 8001, "px-1": 8002}
CONTROLLERS: Final = ("ct-0", "ct-1")
AGENTS: Final = ("gpu-0", "gpu-1", "gpu-2")
HOSTS: Final = ("client", "redis", *PROXIES, *CONTROLLERS, *AGENTS)
REPLICAS: Final = len(AGENTS)

_REDIS_PORT: Final = 6379
_REDMESH: Final = (sys.executable, "-m", "services.cli")


class Fleet:
    """A running mesh on many hosts, as a test sees it."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network = network
        self._folder = folder
        self._client = network["client"]
        self._redis_url = f"redis://{network['redis'].address}:{_REDIS_PORT}/0"
        self.addresses: Mapping[int, str] = {
            port: network[name].address for name, port in PROXIES.items()
        }

    @contextlib.contextmanager
    def running(self) -> Generator[None]:
        """Run every process while the block runs, with the calling thread on the clients' host."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._client.entered())
            redis = (str(redisserver.find_program()), "--port", str(_REDIS_PORT), "--save", "")
            self._start(stack, "redis", *redis, "--bind", "0.0.0.0", "--protected-mode", "no")
            wait_until_sync(self._redis_listens, what="Redis listens")
            for name in CONTROLLERS:
                self._serve(stack, name, "controller", "--controller-name", name)
            for name in AGENTS:
                address = self.network[name].address
                flags = ("--address", address, "--engine-host", "0.0.0.0", "--gpus", "none")
                self._serve(stack, name, "agent", *flags, *self._state(name))
            for name, port in PROXIES.items():
                address = self.network[name].address
                flags = ("--host", address, "--port", str(port), "--proxy-name", name)
                self._serve(stack, name, "proxy", *flags, *self._state(name))
            model = sim_model(MODEL, replicas=REPLICAS, step_ms=STEP_MS, args=("--allow-faults",))
            models = write_models(self._folder / "models.json", model)
            done = self.redmesh("apply", "-f", models)
            assert done.code == 0, done
            yield

    def redmesh(self, *arguments: str | Path) -> Done:
        """Run `redmesh` on the clients' host."""
        done = subprocess.run(
            self._client.within(*_REDMESH, *arguments),
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    async def ask(self, *arguments: str) -> Done:
        """Run `redmesh` on the clients' host while the test's loop goes on."""
        return await asyncio.to_thread(self.redmesh, *arguments)

    @contextlib.asynccontextmanager
    async def registry(self) -> AsyncGenerator[Registry]:
        """Open the mesh's registry from the clients' host."""
        registry = await open_registry(CommonSettings(redis_url=Secret(self._redis_url)))
        try:
            yield registry
        finally:
            await registry.aclose()

    async def fault(self, replica: Replica, **order: object) -> None:
        """Put a fault of the simulated engine in force."""
        await asyncio.to_thread(self._fault, replica, order)

    def logs(self, lines: int = 12) -> str:
        """Collect the ends of all logs, for a failure's message."""
        parts: list[str] = []
        for path in sorted(self._folder.glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"--- {path.name}\n" + "\n".join(tail))
        return "\n".join(parts)

    def _fault(self, replica: Replica, order: Mapping[str, object]) -> None:
        # Engines take faults from their own host only.
        port = replica.url.rpartition(":")[2]
        with self.network[replica.host].entered():
            answer = httpx.post(f"http://127.0.0.1:{port}/sim/faults", json=order, timeout=5)
        assert answer.status_code == 200, answer.text

    def _serve(
        self, stack: contextlib.ExitStack, name: str, service: str, *flags: str | Path
    ) -> None:
        where = ("--host-name", name, "--admin-host", self.network[name].address)
        self._start(stack, name, *_REDMESH, service, *where, *flags)

    def _start(self, stack: contextlib.ExitStack, name: str, *argv: str | Path) -> None:
        log = self._folder / f"{name}.log"
        process = popen(self.network[name], argv, log=log, env=self._environment())
        stack.callback(process.wait, 10)
        stack.callback(process.kill)

    def _state(self, name: str) -> tuple[str, Path]:
        return "--state-dir", self._folder / name

    def _environment(self) -> dict[str, str]:
        return environment(
            {
                "REDMESH_REDIS_URL": self._redis_url,
                "REDMESH_FLEET_SECRET": "a secret of this test",
                "PYTHONUNBUFFERED": "1",
            }
        )

    def _redis_listens(self) -> bool:
        address = (self.network["redis"].address, _REDIS_PORT)
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1):
            return True
        return False


async def proxies(registry: Registry) -> dict[str, Member]:
    """Read the living proxies by their host."""
    return {each.host: each for each in await members(registry, MemberKind.PROXY)}


async def controllers(registry: Registry) -> dict[str, Member]:
    """Read the living controllers by their id."""
    return {each.id: each for each in await members(registry, MemberKind.CONTROLLER)}


async def whole(registry: Registry, wanted: int = REPLICAS) -> bool:
    """Tell whether everybody beats, every wanted replica and no other is there, and all know it."""
    alive = [each for kind in MemberKind for each in await members(registry, kind)]
    snapshot = await registry.replicas.snapshot(MODEL)
    return (
        len(alive) == len(PROXIES) + len(CONTROLLERS) + len(AGENTS)
        and len(await ready_replicas(registry, MODEL)) == wanted
        and len(snapshot.replicas) == wanted
        and await same_tables(registry)
    )


async def same_tables(registry: Registry) -> bool:
    """Tell whether both proxies' routing tables are what the registry holds."""
    snapshot = await registry.replicas.snapshot(MODEL)
    states = {rid: str(replica.state) for rid, replica in snapshot.replicas.items()}
    reports = await reports_of(registry)
    return len(reports) == len(PROXIES) and all(
        (table := report.table.get(MODEL)) is not None
        and (table.ver, table.replicas) == (snapshot.ver, states)
        and report.breaker == "closed"
        for report in reports.values()
    )


async def reports_of(registry: Registry) -> dict[str, LiveReport]:
    """Ask every living proxy for its live requests and tables, by its host."""
    found = await proxies(registry)
    answers = await asyncio.gather(*(live_report(each) for each in found.values()))
    return dict(zip(found, answers, strict=True))


async def leading(registry: Registry) -> list[str]:
    """Name the controllers that say that they lead."""
    pages = {
        name: (await admin.fetch(f"{each.admin_url}/metrics")).decode()
        for name, each in (await controllers(registry)).items()
    }
    return [name for name, page in pages.items() if "\nredmesh_controller_leader 1.0" in page]
