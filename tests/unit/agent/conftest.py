"""Fixtures of the agent's tests: a Redis, the pen of a controller, and agents."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.support.servers import RedisServer, any_binary
from tests.unit.agent.fleet import AgentProcess, Fleet

_next_port = iter(range(23000, 29000, 20))


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """Give a Redis of its own to a test that takes it away or empties it."""
    server = RedisServer(any_binary(), tmp_path / "redis")
    yield server
    server.kill()


@pytest.fixture
async def fleet(redis_server: RedisServer) -> AsyncIterator[Fleet]:
    """Lead a fleet."""
    fleet = await Fleet.over(redis_server)
    yield fleet
    await fleet.registry.aclose()


@pytest.fixture
def start_agent(redis_server: RedisServer, tmp_path: Path) -> Iterator[Callable[..., AgentProcess]]:
    """Start agents that are gone, with their engines, when the test ends."""
    agents: list[AgentProcess] = []

    def start(name: str = "agent", **settings: str) -> AgentProcess:
        first = next(_next_port)
        settings = {"port_range": f"{first}-{first + 19}", **settings}
        agents.append(AgentProcess(redis_server.url, tmp_path / name, **settings))
        return agents[-1]

    yield start
    for agent in agents:
        agent.end()
