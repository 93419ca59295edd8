"""Start, serve, drain and end one simulated engine."""

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import sys
from enum import Enum
from random import Random

import msgspec
import uvloop

from services.simengine.app import Application
from services.simengine.arguments import Options, parse
from services.simengine.engine import Engine
from services.simengine.faults import Faults
from services.simengine.metrics import EngineMetrics
from services.simengine.scheduler import Scheduler
from services.simengine.serving import VERSION, Identity, Serving, now_unix_s
from services.simengine.wire import HttpServer

_DEAD_LINGER_S = 0.3
_FLUSH_TIMEOUT_S = 2.0


class Fate(Enum):
    """Why an engine ends."""

    DRAIN = "drain"
    QUIT = "quit"
    DEAD = "dead"


class Simulator:
    """One engine with its server, ready to start; the parts are its own."""

    def __init__(self, options: Options, loop: asyncio.AbstractEventLoop) -> None:
        self.options = options
        self.fate: asyncio.Future[Fate] = loop.create_future()
        limits = options.limits
        metrics = EngineMetrics(
            options.names[0],
            {
                "block_size": str(limits.block_tokens),
                "enable_prefix_caching": str(limits.prefix_caching),
                "kv_cache_max_concurrency": str(limits.kv_tokens / limits.max_model_len),
                "kv_cache_size_tokens": str(limits.kv_tokens),
                "num_gpu_blocks": str(limits.kv_tokens // limits.block_tokens),
            },
        )
        faults = Faults()
        for order in options.faults:
            faults.apply(order)
        self.engine = Engine(
            loop,
            Scheduler(limits, options.cost),
            metrics,
            faults=faults,
            on_dead=lambda: self.settle(Fate.DEAD),
        )
        config = msgspec.json.encode((options.model, limits))
        identity = Identity(
            names=options.names,
            root=options.model,
            max_model_len=limits.max_model_len,
            pooling=options.pooling,
            fingerprint=f"vllm-{VERSION}-{hashlib.sha256(config).hexdigest()[:8]}",
            mean_answer_tokens=options.mean_answer_tokens,
            created_s=now_unix_s(),
        )
        noise = Random(options.seed)  # noqa: S311 - chance in made-up text, not a secret
        application = Application(
            Serving(identity, self.engine, noise=noise),
            api_key=options.api_key,
            allow_faults=options.allow_faults,
        )
        self.server = HttpServer(loop, application.handle, keep_alive_s=options.keep_alive_s)

    def settle(self, fate: Fate) -> None:
        """Decide why this engine ends; the first reason counts."""
        if not self.fate.done():
            self.fate.set_result(fate)

    async def start(self, sock: socket.socket) -> None:
        """Listen on a bound socket and put the first faults in force."""
        await self.server.start(sock)
        self.engine.resume()

    async def drain(self) -> None:
        """Wait until nothing is in flight, at most the shutdown timeout.

        New requests are still accepted meanwhile and prolong the drain, as in vLLM.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.options.shutdown_timeout_s):
                await self.engine.idle.wait()

    async def stop(self, *, flush: bool) -> None:
        """Stop the step loop and close every connection."""
        self.engine.stop()
        await self.server.stop(timeout_s=_FLUSH_TIMEOUT_S if flush else 0.0)


def main(argv: list[str]) -> int:
    """Run until told to end. Returns 0 after a drain, 1 for what the world lacks, 2 for flags."""
    try:
        options = parse(argv, os.environ)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        with bind(options.host, options.port) as sock:
            return uvloop.run(serve(options, sock))
    except OSError as error:
        sys.stderr.write(
            f"simengine: cannot listen on {options.host}:{options.port}: {error.strerror}; "
            "choose another --host or --port\n"
        )
        return 1


def bind(host: str, port: int) -> socket.socket:
    """Take the address before the engine loads; listening comes after. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


async def serve(options: Options, sock: socket.socket) -> int:
    """Serve on a bound socket until SIGTERM, SIGINT or the engine's death; return the exit code."""
    loop = asyncio.get_running_loop()
    simulator = Simulator(options, loop)
    loop.add_signal_handler(signal.SIGTERM, simulator.settle, Fate.DRAIN)
    loop.add_signal_handler(signal.SIGINT, simulator.settle, Fate.QUIT)
    if not await _started(simulator):
        return 0
    await simulator.start(sock)
    sys.stdout.write(
        f"simengine: {options.names[0]} listening on http://{options.host}:"
        f"{simulator.server.port} pid={os.getpid()}\n"
    )
    sys.stdout.flush()
    fate = await simulator.fate
    if fate is Fate.DEAD:
        await asyncio.sleep(_DEAD_LINGER_S)
    elif fate is Fate.DRAIN:
        await simulator.drain()
    await simulator.stop(flush=fate is Fate.DRAIN and options.shutdown_timeout_s > 0)
    return 1 if fate is Fate.DEAD else 0


async def _started(simulator: Simulator) -> bool:
    """Let the time of loading pass; False if told to end meanwhile."""
    options = simulator.options
    wait_s = None if options.never_ready else options.startup_delay_s
    if wait_s == 0:
        return True
    try:
        async with asyncio.timeout(wait_s):
            await asyncio.shield(simulator.fate)
    except TimeoutError:
        return True
    return False
