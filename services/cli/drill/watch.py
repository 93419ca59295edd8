"""Watches a mesh through its registry and its proxies' admin ports, some ten times a second.

Watching must not disturb: one small script and one field a look, the members and the proxies'
metrics twice a second. What does not answer in time is a fact about the mesh, not an error.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Final

import msgspec

from services.cli.drill import live
from services.cli.drill.records import Sample
from services.cli.drill.scene import Scene, is_whole
from services.cli.observing import ALIVE_MS, info_of, leader_of
from shared.errors import RegistryError, RegistryRefusedError
from shared.models.host import Member, MemberKind
from shared.models.replica import ReplicaState
from shared.registry import Registry

INTERVAL_S: Final = 0.1
SLOW_EVERY_S: Final = 0.5
LOOK_DEADLINE_S: Final = 0.5
"""Redis that does not answer a look within this is away."""


class Watch:
    """Samples of one mesh while a drill runs. `registry` must be one with short timeouts."""

    def __init__(self, registry: Registry, scene: Scene, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._scene = scene
        self._clock = clock
        self._changed = asyncio.Event()
        self._over = False
        self._members = scene.members
        self.samples: list[Sample] = []
        self.live = live.Live()
        """The traffic that the proxies counted, whoever caused it."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Watch while the block runs."""
        # Told by a flag, not by cancelling: before Python 3.12 a library that just got its answer
        # may swallow a cancellation, and a look is short in any case.
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look())
            group.create_task(self._look_slowly())
            try:
                yield
            finally:
                self._over = True

    async def until(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until `predicate` holds after some sample; tells whether it did in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not predicate():
                    self._changed.clear()
                    await self._changed.wait()
                return True
        return predicate()

    async def _look(self) -> None:
        while not self._over:
            began_s = self._clock()
            self._add(await self._sample(began_s))
            await asyncio.sleep(max(0.0, INTERVAL_S - (self._clock() - began_s)))

    async def _look_slowly(self) -> None:
        second = int(self._clock())
        while not self._over:
            began_s = self._clock()
            pages = await self._pages()
            if int(began_s) > second:
                second = int(began_s)
                self.live.take(second - 1, pages)
            away = frozenset(name for name, page in pages.items() if page is None or page.away)
            moved = sum(page.counts.moved for page in pages.values() if page is not None)
            sample = await self._sample_slowly(began_s)
            self._add(msgspec.structs.replace(sample, away=away, moved=moved))
            await asyncio.sleep(max(0.0, SLOW_EVERY_S - (self._clock() - began_s)))

    def _add(self, sample: Sample) -> None:
        self.samples.append(sample)
        self._changed.set()

    async def _pages(self) -> dict[str, live.Page | None]:
        proxies: list[Member] = [m for m in self._members if m.kind is MemberKind.PROXY]
        return await live.pages(proxies, self._scene.model)

    async def _sample(self, at_s: float) -> Sample:
        try:
            async with asyncio.timeout(LOOK_DEADLINE_S):
                replicas = (await self._registry.replicas.snapshot(self._scene.model)).replicas
                leader = await leader_of(self._registry)
        except (RegistryError, TimeoutError):
            return Sample(at_s=at_s, redis=False)
        ready = frozenset(r.rid for r in replicas.values() if r.state is ReplicaState.READY)
        return Sample(at_s=at_s, redis=True, ready=ready, leader=leader)

    async def _sample_slowly(self, at_s: float) -> Sample:
        registry, model = self._registry, self._scene.model
        try:
            async with asyncio.timeout(2 * LOOK_DEADLINE_S):
                seen = (await registry.fleet.members()).values()
                holders = frozenset(await registry.ledger.proxies(model))
                deployment = (await registry.fleet.deployments()).get(model)
                replicas = (await registry.replicas.snapshot(model)).replicas
                leader = await leader_of(registry)
                oldest = await registry.fleet.events(1, "0")
                redis_id = await self._redis_id()
        except (RegistryError, TimeoutError):
            return Sample(at_s=at_s, redis=False)
        ready = [r for r in replicas.values() if r.state is ReplicaState.READY]
        members = tuple(each.member for each in seen if each.seen_ms_ago < ALIVE_MS)
        if any(member.kind is MemberKind.PROXY for member in members):
            self._members = members
        enough = all(
            sum(member.kind is kind for member in members) >= count
            for kind, count in self._scene.counts.items()
        )
        return Sample(
            at_s=at_s,
            redis=True,
            ready=frozenset(r.rid for r in ready),
            revisions=frozenset(r.revision for r in ready),
            redis_id=redis_id,
            oldest_ms=int(oldest[0].id.partition("-")[0]) if oldest else 0,
            leader=leader,
            holders=holders,
            members={member.field: member.pid for member in members},
            whole=enough
            and deployment is not None
            and is_whole(deployment, replicas, members, leader),
        )

    async def _redis_id(self) -> str | None:
        """Name the process that answers; None where it may not be asked."""
        try:
            reply = await self._registry.connection.command("INFO", "server")
        except RegistryRefusedError:
            return None
        return info_of(reply).get("run_id")
