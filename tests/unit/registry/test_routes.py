"""Hints of changed routes: fast when all is well, and a reset whenever some may have been lost."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator, AsyncIterator

import pytest
import redis.asyncio.client
import structlog.testing

from shared.models.replica import ReplicaState
from shared.registry import Registry, open_registry
from shared.registry.routes import RouteHint, RoutesReset
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.lua.exercise import MODEL, lead, make_ready, move
from tests.support.servers import RedisServer, Servers
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def nothing_blocks(unblocked: None) -> None:
    """Every test here also proves that the registry never blocks the loop."""


Heard = list[RouteHint | RoutesReset]


@contextlib.asynccontextmanager
async def listening(registry: Registry) -> AsyncGenerator[Heard]:
    """Gather hints in the background."""
    heard: Heard = []

    async def gather(hints: AsyncIterator[RouteHint | RoutesReset]) -> None:
        async for hint in hints:
            heard.append(hint)

    task = asyncio.create_task(gather(registry.routes.hints()))
    await wait_until(lambda: heard, what="the first reset")
    yield heard
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_hints_form_a_chain(registry: Registry) -> None:
    """Each change is one hint with the record, and its `prev` is the `ver` of the one before."""
    async with listening(registry) as heard:
        fence = await lead(registry)
        await make_ready(registry, fence, "r0")
        await move(registry, "r0", ReplicaState.READY, ReplicaState.FAILED)
        await registry.replicas.delete(fence, MODEL, "r0", 7)
        await wait_until(lambda: len(heard) == 6)
    hints = [hint for hint in heard if isinstance(hint, RouteHint)]
    assert isinstance(heard[0], RoutesReset)
    assert [hint.replica.state if hint.replica else None for hint in hints] == [
        "PENDING",
        "STARTING",
        "READY",
        "FAILED",
        None,
    ]
    assert {(hint.model, hint.rid) for hint in hints} == {(MODEL, "r0")}
    versions = [0, *(hint.ver for hint in hints)]
    assert [hint.prev for hint in hints] == versions[:-1]


@pytest.mark.parametrize("text", ["", "1 2", "1 2 r0 {", "1 2 r0 5", "a b c null", "\x00 \x01"])
async def test_foreign_text(registry: Registry, text: str) -> None:
    """Foreign text on the channel asks for a new snapshot of that model, and breaks nothing."""
    async with listening(registry) as heard:
        channel = registry.keys.routes_channel(MODEL)
        await registry.connection.command("PUBLISH", channel, text)
        await wait_until(lambda: len(heard) == 2)
    hint = heard[1]
    assert isinstance(hint, RouteHint)
    assert (hint.model, hint.replica) == (MODEL, None)


async def test_cut_connection(registry: Registry, redis_server: RedisServer) -> None:
    """After the subscription's connection was cut there is a reset, and hints flow again."""
    async with listening(registry) as heard:
        redis_server.command("CLIENT", "KILL", "TYPE", "PUBSUB")
        await wait_until(lambda: len(heard) == 2)
        assert isinstance(heard[1], RoutesReset)
        fence = await lead(registry)
        await make_ready(registry, fence, "r0")
        await wait_until(lambda: len(heard) >= 5)


async def test_transport_closed_beneath_the_library(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What uvloop raises when Redis dies while the library subscribes again is a loss like any."""
    async with listening(registry) as heard:

        async def closed(*_args: object, **_options: object) -> None:
            monkeypatch.undo()
            raise RuntimeError("unable to perform operation on <TCPTransport closed=True>")

        monkeypatch.setattr(redis.asyncio.client.PubSub, "get_message", closed)
        await wait_until(lambda: len(heard) == 2, what="another reset")
        assert isinstance(heard[1], RoutesReset)


async def test_hung_and_dead_server(servers: Servers) -> None:
    """A server that hangs, or is dead for a while, ends in a reset, never in an error."""
    server = servers.new()
    registry = await open_registry(CommonSettings(redis_url=Secret(server.url)))
    async with listening(registry) as heard:
        with structlog.testing.capture_logs() as lines:
            server.send_signal(signal.SIGSTOP)
            await wait_until(lambda: lines, timeout_s=20, what="the loss to be noticed")
        server.send_signal(signal.SIGCONT)
        await wait_until(lambda: len(heard) >= 2, timeout_s=20)
        count = len(heard)
        server.kill()
        await asyncio.to_thread(server.start)
        await wait_until(lambda: len(heard) > count, timeout_s=20)
        assert all(isinstance(hint, RoutesReset) for hint in heard)
    await registry.aclose()
    server.kill()


async def test_cluster(servers: Servers, key_prefix: str) -> None:
    """On a cluster a hint reaches a subscriber on whichever node."""
    url = await asyncio.to_thread(lambda: servers.cluster().url)
    registry = await open_registry(CommonSettings(redis_url=Secret(url), key_prefix=key_prefix))
    async with listening(registry) as heard:
        fence = await lead(registry)
        for model in ("a", "b", "c", "d"):
            await make_ready(registry, fence, f"r-{model}", model=model)
        await wait_until(lambda: len(heard) == 13)
    assert {hint.model for hint in heard if isinstance(hint, RouteHint)} == {"a", "b", "c", "d"}
    await registry.aclose()
