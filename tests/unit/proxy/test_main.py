"""The proxy as a process: how it starts, what stops it, and how it ends."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Final

import httpx
import pytest

from shared.models.deployment import Deployment, DeploymentSpec, EngineKind, EngineSpec
from shared.models.replica import ReplicaState
from shared.models.routing import ModelSpec
from shared.registry import open_registry
from shared.registry.leadership import Leading
from shared.registry.results import Fence
from shared.registry.specs import spec_fields
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.servers import RedisServer, any_binary, free_port
from tests.support.waiting import wait_until
from tests.unit.proxy.engine import Engine, Exchanged
from tests.unit.proxy.rig import MODEL, chat, replica

START = """
import os, sys
from services.proxy.main import run
from services.proxy.settings import ProxySettings
from shared.settings import load
sys.exit(run(load(ProxySettings, os.environ)))
"""

START_S: Final = 30.0
"""A start is not measured here, and other tests may run beside it."""


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """Run a real Redis for one test."""
    server = RedisServer(any_binary(), tmp_path / "redis")
    yield server
    server.kill()


class Process:
    """A proxy process and where it listens."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, admin_port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.admin = f"http://127.0.0.1:{admin_port}"

    async def ready(self) -> bool:
        """Ask whether it is ready."""
        return await self.get("/health/ready") is not None

    async def get(self, path: str) -> httpx.Response | None:
        """GET from the admin port; None unless it answers 200."""
        try:
            async with httpx.AsyncClient() as http:
                answer = await http.get(self.admin + path)
        except httpx.HTTPError:
            return None
        return answer if answer.status_code == 200 else None

    async def ended(self) -> tuple[int, str]:
        """Wait for its end; return the exit code and what it said."""
        _, err = await asyncio.wait_for(self.process.communicate(), 20)
        code = self.process.returncode
        assert code is not None
        return code, err.decode()


@asynccontextmanager
async def proxy(
    redis_url: str, port: int | None = None, **settings: str
) -> AsyncGenerator[Process]:
    """Start a proxy, and see that it is gone afterwards."""
    port = port or free_port()
    admin_port = free_port()
    environ = {
        **os.environ,
        "REDMESH_REDIS_URL": redis_url,
        "REDMESH_PORT": str(port),
        "REDMESH_ADMIN_PORT": str(admin_port),
        "REDMESH_LOG_FORMAT": "json",
        **{f"REDMESH_{name.upper()}": value for name, value in settings.items()},
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", START, env=environ, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield Process(process, port, admin_port)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def declare(redis_url: str, engine: Engine) -> None:
    """Declare the model and make one replica READY, as controller and agent do."""
    registry = await open_registry(CommonSettings(redis_url=Secret(redis_url)))
    spec = DeploymentSpec(name=MODEL, engine=EngineSpec(kind=EngineKind.SIM))
    deployment = Deployment(spec=spec, generation=1, replicas=1)
    await registry.fleet.declare(MODEL, deployment, 0)
    leading = await registry.leadership.try_lead("test", 60_000)
    assert isinstance(leading, Leading)
    fence = Fence(leading.epoch, "test")
    await registry.specs.write(
        fence, MODEL, spec_fields(ModelSpec(model=MODEL, desired_replicas=1))
    )
    pending = replica("demo-0", engine.url, state=ReplicaState.PENDING)
    await registry.replicas.create(fence, pending)
    states = (ReplicaState.PENDING, ReplicaState.STARTING, ReplicaState.READY)
    for before, after in pairwise(states):
        await registry.replicas.transition(
            "demo-0", MODEL, gen=1, expect=before, to=after, patch={}, fence=None
        )
    await registry.aclose()


async def test_redis_unreachable() -> None:
    """Without Redis and without a copy of the tables it ends with 1 and one clear line."""
    async with proxy(f"redis://127.0.0.1:{free_port()}/0") as running:
        code, said = await running.ended()
        assert code == 1
        assert said.startswith("redmesh proxy: cannot use Redis at 127.0.0.1") or "Redis" in said
        assert len(said.strip().splitlines()) == 1


async def test_port_taken(redis_server: RedisServer) -> None:
    """A port that is taken ends it with 1 and one clear line."""
    async with Engine() as engine:
        port = int(engine.url.rpartition(":")[2])
        async with proxy(redis_server.url, port) as running:
            code, said = await running.ended()
            assert code == 1
            assert f"cannot listen on 127.0.0.1:{port}" in said
            assert len(said.strip().splitlines()) == 1


async def test_serves_and_drains(redis_server: RedisServer) -> None:
    """On SIGTERM it fails readiness, lets the stream finish, releases, and ends with 0."""
    go = asyncio.Event()

    async def paced(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        await exchanged.text("Hello")
        await go.wait()
        await exchanged.text(" there", "stop")
        await exchanged.end_stream()

    async with Engine(paced) as engine, proxy(redis_server.url, drain_delay_s="0.5") as running:
        await declare(redis_server.url, engine)
        await wait_until(running.ready, timeout_s=START_S)
        async with httpx.AsyncClient(base_url=running.url) as http:

            async def knows_the_model() -> bool:
                return (await http.get(f"/v1/models/{MODEL}")).status_code == 200

            await wait_until(knows_the_model)
            body = chat(stream=True)
            async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                parts = answer.aiter_text()
                assert "Hello" in await anext(parts)
                live = await running.get("/live/requests")
                assert live is not None
                shown = live.json()
                assert [one["rid"] for one in shown["requests"][MODEL].values()] == ["demo-0"]
                assert shown["table"][MODEL]["replicas"] == {"demo-0": "READY"}
                assert shown["breaker"] == "closed"
                assert redis_server.command("HGET", f"redmesh:{{{MODEL}}}:nreq", "*") == b"1"
                running.process.send_signal(signal.SIGTERM)

                async def not_ready() -> bool:
                    return not await running.ready()

                await wait_until(not_ready)
                go.set()
                rest = "".join([part async for part in parts])
                assert rest.endswith("data: [DONE]\n\n")
        code, said = await running.ended()
        assert code == 0, said
        assert "proxy_ended" in said
        assert redis_server.command("HGET", f"redmesh:{{{MODEL}}}:nreq", "*") in {b"0", None}
        assert redis_server.command("HKEYS", "redmesh:{ctl}:members") == []


async def test_metrics(redis_server: RedisServer) -> None:
    """Metrics on both ports name the model and count its requests."""
    async with Engine() as engine, proxy(redis_server.url) as running:
        await declare(redis_server.url, engine)
        await wait_until(running.ready, timeout_s=START_S)
        async with httpx.AsyncClient(base_url=running.url) as http:

            async def answered() -> bool:
                return (await http.post("/v1/chat/completions", json=chat())).status_code == 200

            await wait_until(answered)
            public = (await http.get("/metrics")).text
        admin = await running.get("/metrics")
        assert admin is not None
        for text in (public, admin.text):
            assert 'redmesh_proxy_requests_total{model="demo",outcome="2xx"} 1.0' in text
            assert 'redmesh_proxy_ready_replicas{model="demo"} 1.0' in text


async def test_restart_while_redis_is_away(redis_server: RedisServer, tmp_path: Path) -> None:
    """A proxy that restarts while Redis is away serves from its copy of the tables, and heals."""
    state = tmp_path / "state"
    async with Engine() as engine:
        await declare(redis_server.url, engine)
        async with proxy(redis_server.url, state_dir=str(state)) as first:
            await wait_until((state / "routes.json").exists)
            first.process.send_signal(signal.SIGTERM)
            assert (await first.ended())[0] == 0
        redis_server.kill()
        async with proxy(redis_server.url, state_dir=str(state)) as second:
            await wait_until(second.ready, timeout_s=START_S)
            async with httpx.AsyncClient(base_url=second.url) as http:
                answer = await http.post("/v1/chat/completions", json=chat())
                assert answer.status_code == 200
                redis_server.start()
                await declare(redis_server.url, engine)

                async def back() -> bool:
                    live = await second.get("/live/requests")
                    return live is not None and json.loads(live.text)["breaker"] == "closed"

                await wait_until(back)
                assert (await http.post("/v1/chat/completions", json=chat())).status_code == 200
