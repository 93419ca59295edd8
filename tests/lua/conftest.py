"""The servers on which every script must behave alike, and a registry on each."""

from collections.abc import AsyncGenerator, Callable

import fakeredis
import pytest

from shared.registry import Registry
from shared.registry.connection import Connection, check_schema, connect
from shared.registry.keys import Keys
from shared.registry.loader import ScriptLibrary
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.keycheck import key_problems
from tests.support.servers import RedisCluster, Servers, redis_binary

KINDS = ("redis", "valkey", "cluster", "fake")


@pytest.fixture(autouse=True)
def nothing_blocks(unblocked: None) -> None:
    """Every test here also proves that the registry never blocks the loop."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Name the kind of server that the test runs on."""
    if request.param == "redis" and redis_binary() is None:
        pytest.fail("no redis-server on PATH: run `make system`")
    return str(request.param)


@pytest.fixture
def backend(kind: str, servers: Servers) -> object:
    """Start the server before the loop runs."""
    starts: dict[str, Callable[[], object]] = {
        "redis": servers.redis,
        "valkey": servers.valkey,
        "cluster": servers.cluster,
        # fakeredis reads files when it is first used: not in the loop.
        "fake": lambda: fakeredis.FakeRedis().set("used", 1),
    }
    return starts[kind]()


@pytest.fixture(scope="session")
def library() -> ScriptLibrary:
    """Load the scripts as they are in the tree."""
    return ScriptLibrary.load()


@pytest.fixture
async def connection(
    kind: str, backend: object, library: ScriptLibrary, key_prefix: str
) -> AsyncGenerator[Connection]:
    """Connect to the server of this kind."""
    if kind == "fake":
        client = fakeredis.FakeAsyncRedis()
        opened = Connection(client, library, shown_url="fake")
    else:
        url = Secret(str(getattr(backend, "url", "")))
        opened = await connect(CommonSettings(redis_url=url, key_prefix=key_prefix))
    yield opened
    await opened.aclose()


@pytest.fixture
async def door(
    kind: str, backend: object, connection: Connection, key_prefix: str
) -> AsyncGenerator[Registry]:
    """Open a registry on this kind of server, and check the keys that the test leaves."""
    keys = Keys(key_prefix)
    await check_schema(connection, keys)
    yield Registry.over(connection, keys)
    if kind == "fake":
        return
    nodes = backend.nodes if isinstance(backend, RedisCluster) else [backend]
    problems = key_problems(nodes, key_prefix)  # pyright: ignore[reportArgumentType]
    assert not problems, "\n".join(problems)
