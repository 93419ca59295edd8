"""Fixtures that every kind of test may ask for: real servers, a registry, and two checkers.

`registry` works under a key prefix of its own, and afterwards fails the test if it left a key that
is not documented, or one without the TTL it must have. `unblocked` fails a test whose code blocks
the event loop. `quiet_logs` silences the logs of one test.
"""

import logging
import secrets
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Protocol, runtime_checkable

import blockbuster
import hypothesis
import pytest
import structlog

from shared.registry import Registry, open_registry
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.keycheck import key_problems
from tests.support.servers import RedisServer, Servers

# Where `CI` is set Hypothesis would try the same examples each time. Everywhere they are new ones,
# and a failure prints how to replay it.
hypothesis.settings.register_profile(
    "redmesh", hypothesis.settings.get_profile("default"), print_blob=True
)
hypothesis.settings.load_profile("redmesh")


@runtime_checkable
class Logged(Protocol):
    """Processes that write logs: a mesh, or a fleet of hosts."""

    def logs(self, lines: int = 15) -> str:
        """Collect the ends of all logs."""
        ...


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a test that failed what the processes said that it was given."""
    report = yield
    if report.failed:
        for name, given in getattr(item, "funcargs", {}).items():
            if isinstance(given, Logged):
                report.sections.append((f"the logs of {name}", given.logs(60)))
    return report


@pytest.fixture(autouse=True)
def logging_as_found() -> Generator[None]:
    """Fail a test that leaves logging configured otherwise: in another order, others would fail."""
    before = structlog.get_config()
    yield
    after = structlog.get_config()
    structlog.configure(**before)
    assert after == before, "this test leaves structlog configured; use `quiet_logs`, or restore it"


@pytest.fixture
def quiet_logs() -> Generator[None]:
    """Log nothing below critical, for tests in which hundreds of failures are no news."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Generator[Servers]:
    """Give the session's servers, killed at its end."""
    with Servers(Path(tmp_path_factory.mktemp("servers"))) as started:
        yield started


@pytest.fixture
def redis_server(servers: Servers) -> RedisServer:
    """Give the session's Redis server."""
    return servers.redis()


@pytest.fixture
def key_prefix() -> str:
    """Make a key prefix that no other test has."""
    return f"t{secrets.token_hex(4)}"


@pytest.fixture
async def registry(redis_server: RedisServer, key_prefix: str) -> AsyncGenerator[Registry]:
    """Open a registry on the session's Redis, and check the keys that the test leaves."""
    settings = CommonSettings(redis_url=Secret(redis_server.url), key_prefix=key_prefix)
    opened = await open_registry(settings)
    yield opened
    await opened.aclose()
    problems = key_problems([redis_server], key_prefix)
    assert not problems, "\n".join(problems)


@pytest.fixture
def unblocked() -> Generator[None]:
    """Fail a test in which our code blocks the event loop."""
    with blockbuster.blockbuster_ctx(scanned_modules=["shared", "services"]):
        yield
