"""The door to Redis: what each trouble becomes, and that no text shows a password."""

import asyncio
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from redis.asyncio.cluster import RedisCluster
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
from tests.support.certificates import Authority
from tests.support.redis_link import Link
from tests.support.servers import RedisServer, Servers, free_port
from tests.support.waiting import wait_until

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


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Make an authority that nobody knows."""
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=[False, True], ids=["calm", "hot"])
def hot(request: pytest.FixtureRequest) -> bool:
    """Take the client library, and then the data plane's own client."""
    return bool(request.param)


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
async def test_wrong_password(guarded: RedisServer, secret: str, hot: bool) -> None:  # noqa: FBT001
    """A wrong or missing password is a refusal for good that names the remedy."""
    with pytest.raises(RegistryRefusedError, match="REDMESH_REDIS_URL") as error:
        await connect(settings(f"redis://{secret}127.0.0.1:{guarded.port}/0"), hot=hot)
    assert "wrong@" not in str(error.value)


async def test_right_password(guarded: RedisServer, hot: bool) -> None:  # noqa: FBT001
    """With the right password the connection works, and shows it nowhere."""
    connection = await connect(settings(guarded.url), hot=hot)
    await connection.ping()
    assert PASSWORD not in connection.shown_url
    await connection.aclose()


async def test_permission(guarded: RedisServer, hot: bool) -> None:  # noqa: FBT001
    """A user who may not use our keys is refused for good, within a script too."""
    guarded.command("ACL", "SETUSER", "poor", "on", ">pw", "~other:*", "+@all")
    url = f"redis://poor:pw@127.0.0.1:{guarded.port}/0"
    connection = await connect(settings(url), hot=hot)
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


async def test_readonly_looks_for_the_primary(servers: Servers, hot: bool) -> None:  # noqa: FBT001
    """READONLY drops what is open: the next call connects anew, to wherever the name points now."""
    old, new = servers.new(), servers.new()
    connection = await connect(settings(old.url), hot=hot)
    clients = old.command("CLIENT", "LIST", "TYPE", "NORMAL").decode()
    assert clients.count("id=") >= 2
    old.command("REPLICAOF", "127.0.0.1", new.port)
    with pytest.raises(RegistryUnavailableError, match="replica now"):
        await connection.command("SET", "k", "v")

    def dropped() -> bool:
        return old.command("CLIENT", "LIST", "TYPE", "NORMAL").decode().count("id=") == 1

    await wait_until(dropped)
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
        (RuntimeError("the handler is closed"), RegistryUnavailableError),
        (
            AttributeError("'NoneType' object has no attribute 'writelines'"),
            RegistryUnavailableError,
        ),
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
    servers: Servers,
    tmp_path: Path,
    hot: bool,  # noqa: FBT001
) -> None:
    """A rotated password opens new connections as soon as it stands in the file."""
    server = servers.new(password=PASSWORD)
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    url = Secret(f"redis://:outdated@127.0.0.1:{server.port}/0")
    connection = await connect(
        CommonSettings(redis_url=url, redis_password_file=str(file)), hot=hot
    )
    server.command("CONFIG", "SET", "requirepass", "rotated")
    await connection.ping()
    server.password = "rotated"
    # Beside the loop, so that it sees its connections end.
    await asyncio.to_thread(server.command, "CLIENT", "KILL", "TYPE", "normal")
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


async def called(connection: Connection, *, proxy: str = "p1") -> Any:  # noqa: ANN401 - any reply
    """Run the hot script by callback; give what came."""
    keys = Keys("t-called").model("m").pick(HOT.keys, proxy)
    replies: list[Any] = []
    connection.call(HOT, keys, (proxy, "R", "nobody"), replies.append)
    assert replies == []
    await wait_until(lambda: replies)
    return replies[0]


@pytest.mark.parametrize("kind", ["redis", "cluster"])
async def test_calls_by_callback(servers: Servers, kind: str) -> None:
    """A script runs by callback on every topology, and is loaded again where it was forgotten."""
    server = servers.redis() if kind == "redis" else servers.cluster()
    connection = await connect(settings(server.url), hot=True)
    nodes = [server] if isinstance(server, RedisServer) else server.nodes
    for _ in range(2):
        for node in nodes:
            node.command("SCRIPT", "FLUSH")
        assert await called(connection) == [b"0", 0]
        assert await called(connection) == [b"0", 0]
    await connection.aclose()


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
async def test_calls_that_fail_are_answered_with_our_errors(scheme: str) -> None:
    """Where nobody listens, a call by callback is answered with the registry's error."""
    url = f"{scheme}://user:{PASSWORD}@127.0.0.1:{free_port()}/0"
    connection = await connect(settings(url), hot=True, prove=False)
    for _ in range(3):
        reply = await called(connection)
        assert type(reply) is RegistryUnavailableError
        assert PASSWORD not in str(reply)
    await connection.aclose()


@pytest.mark.parametrize(
    ("error", "told"), [(AttributeError("no writer"), 0), (ZeroDivisionError("a fault"), 1)]
)
async def test_calls_are_answered_whatever_the_library_raises(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: int
) -> None:
    """A connection that is closed under a call, and a fault, are answers, too; a fault is told."""
    connection = await connect(settings("redis+cluster://127.0.0.1:1/0"), hot=True, prove=False)
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))

    async def fails(_self: object, *_parts: object) -> None:
        raise error

    monkeypatch.setattr(RedisCluster, "execute_command", fails)
    assert type(await called(connection)) is RegistryUnavailableError
    assert len(faults) == told
    await connection.aclose()


async def test_calls_of_a_senseless_batch_are_refused(redis_server: RedisServer) -> None:
    """A script's own refusal reaches the callback, with what it says."""
    connection = await connect(settings(redis_server.url), hot=True)
    replies: list[Any] = []
    keys = Keys("t-called").model("m").pick(HOT.keys, "p1")
    connection.call(HOT, keys, ("p1", "X"), replies.append)
    await wait_until(lambda: replies)
    assert type(replies[0]) is RegistryRefusedError
    assert "BADOP argument" in str(replies[0])
    await connection.aclose()


async def test_calls_follow_the_primary(servers: Servers) -> None:
    """A replica's READONLY drops the connection, so that the next call resolves the name again."""
    old, new = servers.new(), servers.new()
    with Link(old.port) as link:
        connection = await connect(settings(link.url()), hot=True)
        assert await called(connection) == [b"0", 0]
        old.command("REPLICAOF", "127.0.0.1", new.port)
        link.lead_to(new.port, cut=False)
        reply = await called(connection)
        assert type(reply) is RegistryUnavailableError
        assert "replica now" in str(reply)
        assert await called(connection) == [b"0", 0]
        await connection.aclose()
    old.kill()
    new.kill()


async def test_calls_under_way_when_we_close_are_answered(servers: Servers) -> None:
    """Closing leaves no call without its answer, on a cluster neither."""
    server = servers.new()
    for url in (server.url, servers.cluster().url):
        connection = await connect(settings(url), hot=True)
        server.command("CLIENT", "PAUSE", 150, "ALL")
        replies: list[Any] = []
        keys = Keys("t-called").model("m").pick(HOT.keys, "p1")
        connection.call(HOT, keys, ("p1", "R", "a"), replies.append)
        await connection.aclose()
        await wait_until(lambda replies=replies: replies)
        assert isinstance(replies[0], RegistryUnavailableError)
    server.kill()


async def test_database_and_name_of_the_url(redis_server: RedisServer) -> None:
    """The data plane's own client honours what the URL says, as the client library does."""
    url = redis_server.url.removesuffix("0") + "3?client_name=px-7"
    connection = await connect(settings(url), hot=True)
    info = (await connection.command("CLIENT", "INFO")).decode()
    assert " db=3 " in info
    assert " name=px-7 " in info
    await connection.aclose()


async def test_unknown_option_of_the_url(redis_server: RedisServer) -> None:
    """An option that the client library does not know is an error in words, never a hang."""
    connection = await connect(settings(redis_server.url + "?no_such=1"), hot=True, prove=False)
    reply = await called(connection)
    assert type(reply) is RegistryUnavailableError
    assert "no_such" in str(reply)
    await connection.aclose()


async def test_tls(servers: Servers, authority: Authority, hot: bool) -> None:  # noqa: FBT001
    """Over TLS everything works as without; a server that cannot prove who it is gets nothing."""
    port, signed = free_port(), authority.sign()
    server = servers.new(
        *("--tls-port", str(port), "--tls-auth-clients", "no"),
        *("--tls-cert-file", str(signed.certificate), "--tls-key-file", str(signed.key)),
        *("--tls-ca-cert-file", str(authority.certificate)),
        password=PASSWORD,
    )
    url = f"rediss://:{PASSWORD}@127.0.0.1:{port}/0"
    connection = await connect(settings(f"{url}?ssl_ca_certs={authority.certificate}"), hot=hot)
    assert await called(connection) == [b"0", 0]
    replies = await asyncio.gather(*(connection.command("ECHO", "x" * 9000) for _ in range(50)))
    assert set(replies) == {b"x" * 9000}
    await connection.aclose()
    with pytest.raises(RegistryUnavailableError, match="certificate"):
        await connect(settings(url), hot=hot)
    server.kill()
