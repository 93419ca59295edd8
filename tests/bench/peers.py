"""Other LLM routers, measured beside ours where `make bench-peers` has installed them.

Each runs in the environment `.tools/peers` with what it would need in earnest and no more: its
policy by load, no access log, one thread because it has one core. Neither shares any state.
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Final

from tests.bench.machine import BenchError, process
from tests.bench.site import Server, Site, begun, listens
from tests.support.servers import free_port

HOME: Final = Path(__file__).parents[2] / ".tools" / "peers"

PROGRAMS: Final[Mapping[str, Sequence[str]]] = {
    "vllm-router": ("vllm-router",),
    "sglang-router": ("sglang-router", "launch"),
}
"""Each peer's command, by the name of its package and of its program."""


def installed(name: str) -> bool:
    """Tell whether the peer `name` has been installed."""
    return (HOME / "bin" / name).exists()


def peer(name: str) -> Callable[[Site], AbstractAsyncContextManager[Server]]:
    """Make a server of the peer `name`."""

    @asynccontextmanager
    async def start(site: Site) -> AsyncGenerator[Server]:
        if not installed(name):
            raise BenchError(f"{name} is not installed: make bench-peers")
        port = free_port()
        program, *rest = PROGRAMS[name]
        log = site.folder / f"{name}.log"
        command = (
            *(*site.cores.on_measured(), HOME / "bin" / program, *rest),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
            *("--policy", "power_of_two", "--log-level", "error"),
            *("--worker-startup-check-interval", "1"),
            *("--worker-urls", *(f"http://127.0.0.1:{each}" for each in site.replica_ports)),
        )
        async with process(*command, log=log) as running:
            # It does not listen before it has found its workers healthy.
            await begun(lambda: listens(port), name, log)
            yield Server(name, port, running.pid)

    return start
