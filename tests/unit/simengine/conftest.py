"""Engines to talk to: inside the test's own loop, or as a process of their own."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from services.simengine.arguments import parse
from services.simengine.main import Simulator, bind
from tests.unit.simengine.driving import EngineProcess, Started

ROOT = Path(__file__).parents[3]
FAST = ["--step-ms", "1", "--prefill-us-per-token", "0", "--decode-us-per-seq", "0"]


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Awaitable[Started]]]:
    """Give a function that starts engines in this loop, with flags and a key."""
    begun: list[Started] = []

    async def begin(*flags: str, key: str = "", send_buffer_bytes: int = 0) -> Started:
        argv = ["--model", "/models/m", "--served-model-name", "tiny", "alias", "--port", "0"]
        options = parse([*argv, *FAST, *flags], {"VLLM_API_KEY": key})
        simulator = Simulator(options, asyncio.get_running_loop())
        sock = bind("127.0.0.1", 0)
        if send_buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        await simulator.start(sock)
        client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{simulator.server.port}", timeout=10.0
        )
        started = Started(simulator, client)
        begun.append(started)
        return started

    yield begin
    for started in begun:
        await started.client.aclose()
        await started.simulator.stop(flush=True)


@pytest.fixture
def spawn() -> Iterator[Callable[..., EngineProcess]]:
    """Give a function that starts engines as processes and waits until they listen."""
    begun: list[EngineProcess] = []

    def begin(*flags: str, listening: bool = True) -> EngineProcess:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "services.simengine", "--model", "m", "--port", "0"),
                *("--served-model-name", "tiny", "--allow-faults"),
                *(FAST + list(flags)),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ["PATH"]},
            text=True,
        )
        engine = EngineProcess(process)
        begun.append(engine)
        if listening:
            engine.read_port()
        return engine

    yield begin
    for engine in begun:
        engine.end()
