"""Hints of changed routes that are lost by the dozen: every table is right all the same.

Real proxies before replicas that nobody asks anything of; what changes is their records. Each time
a subscription is cut the client library subscribes again, and what was published meanwhile is lost.
"""

import asyncio
import random
import time
from pathlib import Path
from typing import Final

import pytest

from shared.models.replica import ReplicaState
from shared.registry import Registry, open_registry
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.servers import RedisServer, any_binary
from tests.support.standalone import ProxyProcess, declare, proxy
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mesh

MODEL: Final = "sim"
REPLICAS: Final = 6
CUTS: Final = 30
BEAT_S: Final = 1.2
"""At most, with its jitter: a beat's reply tells the version of the routes."""
SEED: Final = 3


async def shown(one: ProxyProcess) -> dict[str, str]:
    """Give the state of each replica in a proxy's table."""
    live = await one.get("/live/requests")
    assert live is not None
    return live.json()["table"][MODEL]["replicas"]


async def recorded(registry: Registry) -> dict[str, str]:
    """Give the state of each replica as it is recorded."""
    snapshot = await registry.replicas.snapshot(MODEL)
    return {rid: str(each.state) for rid, each in snapshot.replicas.items()}


async def test_tables_are_right_a_beat_after_the_last_of_many_cuts(tmp_path: Path) -> None:
    """Thirty cuts and sixty changes, of which many hints are lost: a beat later all tables agree.

    The last change comes right after the last cut, so that its hint is among those lost.
    """
    server = RedisServer(any_binary(), tmp_path / "redis")
    chance = random.Random(SEED)
    registry = await open_registry(CommonSettings(redis_url=Secret(server.url)))
    await declare(registry, MODEL, [f"http://127.0.0.1:{port}" for port in range(1, REPLICAS + 1)])
    rids = list(await recorded(registry))
    changes = 0

    async def change() -> None:
        nonlocal changes
        rid = chance.choice(rids)
        states = [ReplicaState.READY, ReplicaState.UNHEALTHY]
        if (await recorded(registry))[rid] == ReplicaState.UNHEALTHY:
            states.reverse()
        before, after = states
        await registry.replicas.transition(rid, MODEL, gen=1, expect=before, to=after, fence=None)
        changes += 1

    async with proxy(server.url) as first, proxy(server.url) as second:
        proxies = (first, second)
        for each in proxies:
            await wait_until(lambda each=each: each.serves(MODEL), timeout_s=60, what="it serves")
        cut = 0
        for _ in range(CUTS):
            await asyncio.sleep(chance.uniform(0, 0.15))  # so that some have subscribed again
            await change()
            cut += int(await asyncio.to_thread(server.command, "CLIENT", "KILL", "TYPE", "pubsub"))
            await change()
        ended_s = time.monotonic()
        truth = await recorded(registry)

        async def equal() -> bool:
            return [await shown(each) for each in proxies] == [truth, truth]

        await wait_until(equal, timeout_s=BEAT_S, interval_s=0.01, what="all tables are right")
        took_s = time.monotonic() - ended_s
    print(f"\n{cut} subscriptions cut, {changes} changes: tables right {took_s:.2f} s later")  # noqa: T201 - figures for the reader
    assert changes == 2 * CUTS
    assert cut >= CUTS, "the proxies were hardly ever subscribed"
    await registry.aclose()
    server.kill()
