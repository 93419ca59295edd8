"""The door to Redis: what each trouble becomes, and that no text shows a password."""

import asyncio
import time
from collections.abc import Generator
from pathlib import Path

import pytest
import redis.asyncio
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    RedisClusterException,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from shared.errors import (
    InvalidInputError,
    RedmeshError,
    RegistryRefusedError,
    RegistryTimeoutError,
    RegistryUnavailableError,
    SchemaVersionError,
)
from shared.registry import Registry, open_registry
from shared.registry.connection import Connection, check_schema, connect
from shared.registry.keys import Keys
from shared.registry.ledger import HOT
from shared.registry.loader import ScriptLibrary
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.servers import RedisServer, Servers, free_port

PASSWORD = "s3cret-and-long"


@pytest.fixture(autouse=True)
def nothing_blocks(unblocked: None) -> None:
    """Every test here also proves that the registry never blocks the loop."""


@pytest.fixture(scope="module")
def guarded(servers: Servers) -> Generator[RedisServer]:
    """Give a server with a password."""
    server = servers.new(password=PASSWORD)
    yield server
    server.kill()


def settings(url: str, prefix: str = "redmesh") -> CommonSettings:
    """Make settings."""
    return CommonSettings(redis_url=Secret(url), key_prefix=prefix)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://x",
        "redis:/x",
        "redis://h:port",
        "redis://h:99999",
        "unix:///x",
        "localhost:6379",
    ],
)
async def test_wrong_url(url: str) -> None:
    """A URL that is none is refused as input, with the schemes that there are."""
    with pytest.raises(InvalidInputError, match="redis_url"):
        await connect(settings(url))


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
async def test_unreachable(scheme: str) -> None:
    """When nothing listens, the error names the place without the password, and the remedy."""
    url = f"{scheme}://user:{PASSWORD}@127.0.0.1:{free_port()}/0"
    with pytest.raises(RegistryUnavailableError, match=r"127\.0\.0\.1.*REDMESH_REDIS_URL") as error:
        await open_registry(settings(url))
    assert PASSWORD not in str(error.value)
    assert "user" not in str(error.value)


@pytest.mark.parametrize("secret", ["", ":wrong@", "nobody:wrong@"])
async def test_wrong_password(guarded: RedisServer, secret: str) -> None:
    """A wrong or missing password is a refusal for good that names the remedy."""
    with pytest.raises(RegistryRefusedError, match="REDMESH_REDIS_URL") as error:
        await connect(settings(f"redis://{secret}127.0.0.1:{guarded.port}/0"))
    assert "wrong@" not in str(error.value)


async def test_right_password(guarded: RedisServer) -> None:
    """With the right password the connection works, and shows it nowhere."""
    connection = await connect(settings(guarded.url))
    await connection.ping()
    assert PASSWORD not in connection.shown_url
    await connection.aclose()


async def test_permission(guarded: RedisServer) -> None:
    """A user who may not use our keys is refused for good, within a script too."""
    guarded.command("ACL", "SETUSER", "poor", "on", ">pw", "~other:*", "+@all")
    connection = await connect(settings(f"redis://poor:pw@127.0.0.1:{guarded.port}/0"))
    keys = Keys().model("m").pick(HOT.keys, "p1")
    with pytest.raises(RegistryRefusedError, match="REDMESH_REDIS_URL"):
        await connection.evalsha(HOT, keys, ("p1", "R", "a"))
    await connection.aclose()


async def test_hung_server(servers: Servers) -> None:
    """A hung server is a timeout after a quarter of a second on the hot path, without retries."""
    server = servers.new()
    connection = await connect(settings(server.url), hot=True)
    server.command("CLIENT", "PAUSE", 2000, "ALL")
    before = time.monotonic()
    with pytest.raises(RegistryTimeoutError, match="did not answer in time"):
        await connection.ping()
    assert 0.2 < time.monotonic() - before < 1.0
    await connection.aclose()
    server.kill()


async def test_slow_server_at_start(servers: Servers) -> None:
    """At start a server that is slow for a second does not fail the hot path's short timeout."""
    server = servers.new()
    server.command("CLIENT", "PAUSE", 800, "ALL")
    registry = await open_registry(settings(server.url), hot=True)
    await registry.connection.ping()
    await registry.aclose()
    server.kill()


async def test_restarted_server(servers: Servers) -> None:
    """After a restart of the server the hot path works again at the first try."""
    server = servers.new()
    connection = await connect(settings(server.url), hot=True)
    await asyncio.gather(*(connection.ping() for _ in range(20)))
    await asyncio.to_thread(server.kill)
    with pytest.raises(RegistryUnavailableError):
        await connection.ping()
    await asyncio.to_thread(server.start)
    await asyncio.gather(*(connection.ping() for _ in range(20)))
    await connection.aclose()
    server.kill()


async def test_exhausted_pool(servers: Servers) -> None:
    """More calls at once than connections wait for their turn; none is lost."""
    connection = await connect(settings(servers.redis().url), hot=True)
    await asyncio.gather(*(connection.ping() for _ in range(50)))
    await connection.aclose()


async def test_readonly_looks_for_the_primary(servers: Servers) -> None:
    """READONLY drops the pool: the next call connects anew, to wherever the name points now."""
    old, new = servers.new(), servers.new()
    connection = await connect(settings(old.url))
    clients = old.command("CLIENT", "LIST", "TYPE", "NORMAL").decode()
    assert clients.count("id=") >= 2
    old.command("REPLICAOF", "127.0.0.1", new.port)
    with pytest.raises(RegistryUnavailableError, match="replica now"):
        await connection.command("SET", "k", "v")
    clients = old.command("CLIENT", "LIST", "TYPE", "NORMAL").decode()
    assert clients.count("id=") == 1
    await connection.aclose()
    old.kill()
    new.kill()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ResponseError("MISCONF cannot persist"), RegistryUnavailableError),
        (BusyLoadingError("loading"), RegistryUnavailableError),
        (ClusterDownError("CLUSTERDOWN"), RegistryUnavailableError),
        (TryAgainError("TRYAGAIN"), RegistryUnavailableError),
        (MasterDownError("MASTERDOWN"), RegistryUnavailableError),
        (OutOfMemoryError("maxmemory"), RegistryUnavailableError),
        (ResponseError("BUSY Redis is busy"), RegistryUnavailableError),
        (
            ResponseError("Error running script: @user_script:5: -READONLY You"),
            RegistryUnavailableError,
        ),
        (RedisConnectionError("gone"), RegistryUnavailableError),
        (RedisClusterException("no node"), RegistryUnavailableError),
        (OSError(104, "reset"), RegistryUnavailableError),
        (RedisTimeoutError("late"), RegistryTimeoutError),
        (ResponseError("unknown command"), RegistryRefusedError),
        (NoPermissionError("NOPERM"), RegistryRefusedError),
        (AuthenticationError("bad"), RegistryRefusedError),
    ],
    ids=repr,
)
async def test_every_trouble_has_its_word(
    error: Exception, kind: type[RedmeshError], redis_server: RedisServer
) -> None:
    """Each error of the client library becomes the one of ours that tells a caller what to do."""
    client = redis.asyncio.Redis(port=redis_server.port, driver_info=None)
    connection = Connection(client, ScriptLibrary({}), shown_url="redis://h:1")
    mapped = await connection.mapped(error)
    assert type(mapped) is kind
    assert "redis://h:1" in str(mapped)
    await connection.aclose()


async def test_script_errors_name_their_source(registry: Registry) -> None:
    """An error within a script names the line of the Lua file, not of the assembled text."""
    keys = list(registry.keys.model("m").pick(HOT.keys, "p1"))
    keys[7] = registry.keys.model("m").ver
    await registry.connection.command("SET", keys[7], "1")
    with pytest.raises(RedmeshError, match=r"foreign data|lua/ledger/hot\.lua:\d+"):
        await registry.connection.evalsha(HOT, keys, ("p1", "A", "a", 1, 0, 0, 0))


@pytest.mark.parametrize("found", ["2", "0", "x", "", "1.5", "-1", "9" * 400])
async def test_unsupported_schema(registry: Registry, found: str) -> None:
    """Data of a schema outside our range is refused, with the version and three ways out."""
    key = registry.keys.fleet.schema
    assert await check_schema(registry.connection, registry.keys) == 1
    await registry.connection.command("SET", key, found)
    with pytest.raises(SchemaVersionError, match="REDMESH_KEY_PREFIX"):
        await check_schema(registry.connection, registry.keys)
    await registry.connection.command("DEL", key)


async def test_password_from_a_file_is_read_for_each_connection(
    servers: Servers, tmp_path: Path
) -> None:
    """A rotated password opens new connections as soon as it stands in the file."""
    server = servers.new(password=PASSWORD)
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    url = Secret(f"redis://:outdated@127.0.0.1:{server.port}/0")
    connection = await connect(CommonSettings(redis_url=url, redis_password_file=str(file)))
    server.command("CONFIG", "SET", "requirepass", "rotated")
    await connection.ping()
    server.password = "rotated"
    server.command("CLIENT", "KILL", "TYPE", "normal")
    with pytest.raises(RegistryRefusedError, match="REDMESH_REDIS_PASSWORD_FILE"):
        await connection.ping()
    file.unlink()
    with pytest.raises(RegistryRefusedError, match="cannot be read"):
        await connection.ping()
    file.write_text("rotated")
    await connection.ping()
    await connection.aclose()
    server.kill()


async def test_many_models_at_once_on_a_cluster(servers: Servers) -> None:
    """The client of a cluster does not refuse what its connections cannot carry at once."""
    registry = await open_registry(settings(servers.cluster().url, "t-many"), hot=True)
    await asyncio.gather(*(registry.ledger.beat("m", f"p{n}") for n in range(60)))
    await registry.aclose()
