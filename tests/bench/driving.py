"""A process of proxies that reserve and release as fast as the ledger lets them, and nothing else.

What runs is the proxy's own code: its reservations, over the registry's client for the data plane.
A proxy here keeps a number of requests held, as if they were being answered; each answer to a
reserve ends the one that has been held longest, and begins another.
"""

import asyncio
import random
import resource
import sys
from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec
import structlog
import uvloop

from services.proxy.breaker import RedisBreaker
from services.proxy.metrics import LedgerMetrics, Metrics
from services.proxy.reservations import Reservations
from shared.registry import Registry, open_registry
from shared.registry.ledger import BUSY, NONE
from shared.secret import Secret
from shared.settings import CommonSettings

AGAIN_S: Final = 0.02
BEAT_S: Final = 1.0


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What one process is to do."""

    url: str
    prefix: str
    model: str
    names: tuple[str, ...]
    """Its proxies."""
    asking: int
    """Reserves under way at once, per proxy."""
    held: int
    """Reservations that each proxy keeps."""
    warm_s: float
    seconds: float


class Driven(msgspec.Struct, frozen=True, kw_only=True):
    """What one process did."""

    pairs: int
    """While it measured."""
    all_pairs: int
    """With the warming up: what Redis has worked for."""
    local: int
    """Reserves that were decided without the ledger while it measured: they spoil the measure."""
    batches: int
    seconds: float
    cpu_s: float


class Driver:
    """One proxy under load."""

    def __init__(self, registry: Registry, orders: Orders, name: str) -> None:
        self.pairs = 0
        self.local = 0
        self.batches = 0
        self._held: deque[str] = deque()
        self._keep = orders.held
        self._number = 0
        self._open = True
        self._random = random.Random(name)
        self._registry, self._model, self._name = registry, orders.model, name
        self._loop = asyncio.get_running_loop()
        self._reservations = Reservations(
            model=orders.model,
            proxy=name,
            ledger=registry.ledger,
            breaker=RedisBreaker(),
            choose_locally=self._locally,
            saw_version=self._batch,
            metrics=LedgerMetrics(Metrics(), orders.model),
            random=self._random,
        )
        for _ in range(orders.asking):
            self._ask()

    async def beats(self) -> None:
        """Beat each second, as a proxy does; ask the ledger again if it was slow."""
        while True:
            await asyncio.sleep(BEAT_S)
            await self._registry.ledger.beat(self._model, self._name)
            self._reservations.breaker.fast_beat()

    def _locally(self, exclude: Sequence[str]) -> str:
        del exclude
        self.local += 1
        return NONE

    def _batch(self, ver: int) -> None:
        del ver
        self.batches += 1

    def _ask(self) -> None:
        if not self._open:
            return
        self._number += 1
        request = f"{self._number:x}-1"
        cost_tokens = 50 + self._number % 7 * 100

        def answered(rid: str) -> None:
            if rid in {BUSY, NONE}:
                self._loop.call_later(AGAIN_S, self._ask)
                return
            self.pairs += 1
            self._held.append(request)
            if len(self._held) > self._keep:
                self._reservations.release(self._held.popleft())
            self._ask()

        self._reservations.reserve(request, cost_tokens, (), answered)

    async def stop(self) -> None:
        """Give everything back."""
        self._open = False
        await self._reservations.flushed(5.0)
        while self._held:
            self._reservations.release(self._held.popleft())
        await self._reservations.flushed(5.0)
        await self._reservations.aclose()


async def drive(orders: Orders) -> Driven:
    """Reserve and release for a while."""
    settings = CommonSettings(redis_url=Secret(orders.url), key_prefix=orders.prefix)
    registry = await open_registry(settings, hot=True)
    drivers = [Driver(registry, orders, name) for name in orders.names]
    loop = asyncio.get_running_loop()
    beating = [asyncio.create_task(one.beats()) for one in drivers]
    await asyncio.sleep(orders.warm_s)
    before = [(one.pairs, one.batches, one.local) for one in drivers]
    cpu_s, began_s = _cpu_s(), loop.time()
    await asyncio.sleep(orders.seconds)
    cpu_s, took_s = _cpu_s() - cpu_s, loop.time() - began_s
    driven = Driven(
        pairs=sum(one.pairs - pairs for one, (pairs, _, _) in zip(drivers, before, strict=True)),
        all_pairs=0,
        local=sum(one.local - local for one, (_, _, local) in zip(drivers, before, strict=True)),
        batches=sum(
            one.batches - count for one, (_, count, _) in zip(drivers, before, strict=True)
        ),
        seconds=took_s,
        cpu_s=cpu_s,
    )
    for task in beating:
        task.cancel()
    await asyncio.gather(*beating, return_exceptions=True)
    await asyncio.gather(*(one.stop() for one in drivers))
    await registry.aclose()
    return msgspec.structs.replace(driven, all_pairs=sum(one.pairs for one in drivers))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Read orders from stdin, begin, and write what came of it to stdout."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    orders = msgspec.json.decode(sys.stdin.readline(), type=Orders)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        driven = runner.run(drive(orders))
    sys.stdout.buffer.write(msgspec.json.encode(driven))


if __name__ == "__main__":
    main()
