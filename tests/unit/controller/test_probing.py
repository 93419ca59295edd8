import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing

import pytest

from services.controller.probing import HttpProber
from services.controller.settings import ControllerSettings, check
from shared.errors import InvalidInputError
from shared.models.deployment import EngineKind
from shared.models.replica import Replica, ReplicaState
from shared.secret import Secret, replica_api_key


@asynccontextmanager
async def engine(answer: bytes | None, seen: list[bytes]) -> AsyncGenerator[str]:
    """Serve one fixed answer, or none, and note what was asked."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            if answer is None:
                await reader.read()
            else:
                writer.write(answer)
                await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def replica(url: str, *, kind: EngineKind = EngineKind.SIM, env: str | None = None) -> Replica:
    """Make a replica that serves at `url`."""
    return Replica(
        rid="m-1",
        model="m",
        gen=7,
        state=ReplicaState.READY,
        host="h",
        revision="r",
        kind=kind,
        url=url,
        api_key_env=env,
    )


def prober(deadline_s: float = 2.0) -> HttpProber:
    """Make a prober that knows the fleet's secret and one upstream key."""
    return HttpProber(Secret("fleet"), {"UPSTREAM": "k3y"}, deadline_s)


@pytest.mark.parametrize(
    ("answer", "alive"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", True),
        (b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n", True),
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", False),
        (b"SSH-2.0-OpenSSH\r\n", False),
        (b"", False),
        (b"x" * 10_000, False),
    ],
)
async def test_any_http_answer_below_500_counts(answer: bytes, *, alive: bool) -> None:
    """What speaks HTTP and is not failing is there; anything else is not."""
    async with engine(answer, []) as url:
        assert await prober().answers(replica(url)) is alive


async def test_silence_is_no_answer_and_ends_in_time() -> None:
    """An engine that accepts and says nothing does not answer."""
    async with engine(None, []) as url:
        assert not await prober(0.05).answers(replica(url))


async def test_nobody_there_is_no_answer() -> None:
    """A refused connection and a URL that is none do not raise."""
    async with engine(b"", []) as url:
        pass
    assert not await prober().answers(replica(url))
    assert not await prober().answers(replica("nonsense"))


async def test_the_replicas_own_key_is_used() -> None:
    """Our engines are asked with their derived key, external ones with that of the environment."""
    seen: list[bytes] = []
    async with engine(b"HTTP/1.1 200 OK\r\n\r\n", seen) as url:
        await prober().answers(replica(url))
        await prober().answers(replica(f"{url}/api/", kind=EngineKind.EXTERNAL, env="UPSTREAM"))
    derived = replica_api_key(Secret("fleet"), "m-1", 7).encode()
    assert seen[0].startswith(b"GET /v1/models HTTP/1.1\r\n")
    assert b"Authorization: Bearer " + derived in seen[0]
    assert seen[1].startswith(b"GET /api/v1/models HTTP/1.1\r\n")
    assert b"Authorization: Bearer k3y" in seen[1]


def test_all_wrong_settings_are_named_at_once() -> None:
    """Every setting that makes no sense is named, with what it may be."""
    wrong = ControllerSettings(
        controller_name="a b", admin_port=70_000, lease_ttl_ms=10, interval_s=0
    )
    with pytest.raises(InvalidInputError) as caught:
        check(wrong)
    text = str(caught.value)
    for name in ("CONTROLLER_NAME", "ADMIN_PORT", "LEASE_TTL_MS", "INTERVAL_S"):
        assert f"REDMESH_{name}=" in text
