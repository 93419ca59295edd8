"""One fault of Redis under load: what the mesh was before, how it did meanwhile, what it was after.

The promise is the same for every fault: no request fails, a request waits no longer for its replica
than it would with a healthy Redis, and within ten seconds after Redis is back the accounts agree.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Final

import httpx
import msgspec

from shared.models.replica import Replica
from shared.registry import Registry
from shared.registry.keys import Keys
from tests.support.mesh import Mesh, ready_replicas
from tests.support.redis_topologies import Server
from tests.support.streams import Load, Report
from tests.support.waiting import wait_until

CLEAN_BOUND_S: Final = 10.0
"""From Redis' return until an audit begins that finds nothing."""
NOTICED_BOUND_S: Final = 0.5
"""From a fault until no request waits for Redis any more."""
ADDED_BOUND_S: Final = 0.001
"""What the absence of Redis may add to a request, on average and in the middle of all."""
_BATCHES: Final = "redmesh_proxy_ledger_batch_seconds_count"
_PROMPTLY: Final = f'redmesh_proxy_choice_seconds_bucket{{le="{ADDED_BOUND_S}"}}'
_SAMPLE: Final = re.compile(r"^(\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)
_LIMIT: Final = re.compile(r'le="[^"]*"')


class Choices(msgspec.Struct, frozen=True):
    """How many replicas were chosen so far, how long that took, and for how many it was local."""

    count: float
    took_s: float
    local: float
    prompt: float
    """Those that took `ADDED_BOUND_S` at most."""

    def since(self, before: "Choices") -> "Choices":
        """Give what came after `before`."""
        return Choices(
            self.count - before.count,
            self.took_s - before.took_s,
            self.local - before.local,
            self.prompt - before.prompt,
        )

    @property
    def late(self) -> float:
        """Count those that took longer than `ADDED_BOUND_S`."""
        return self.count - self.prompt

    @property
    def mean_s(self) -> float:
        """Tell how long one choice took."""
        return self.took_s / self.count if self.count else 0.0


class Trial:
    """One fault: begun by `strike`, over at `returned`, judged at the end."""

    def __init__(self, mesh: Mesh, model: str, load: Load, http: httpx.AsyncClient) -> None:
        self.mesh = mesh
        self.load = load
        self.figures: dict[str, str] = {}
        self.before: dict[str, Replica] = {}
        self._model = model
        self._http = http
        self._returned_s = 0.0
        self._batches: list[float] = []
        self._primary: Server | None = None
        self._leases: dict[str, set[bytes]] = {}

    async def choices(self) -> Choices:
        """Read from all proxies how choosing for the model went so far."""
        total = Choices(0, 0, 0, 0)
        for values in await self._metrics():
            total = Choices(
                total.count + values.get("redmesh_proxy_choice_seconds_count", 0),
                total.took_s + values.get("redmesh_proxy_choice_seconds_sum", 0),
                total.local + values.get("redmesh_proxy_local_choices_total", 0),
                total.prompt + values.get(_PROMPTLY, 0),
            )
        return total

    async def _metrics(self) -> list[Mapping[str, float]]:
        answers = await asyncio.gather(
            *(self._http.get(f"{url}/metrics") for url in self.mesh.urls)
        )
        return [self._of_model(answer.text) for answer in answers]

    def _of_model(self, page: str) -> Mapping[str, float]:
        """Read the model's own samples, those of buckets with their limits."""
        label = f'model="{self._model}"'
        samples: dict[str, float] = {}
        for name, labels, value in _SAMPLE.findall(page):
            if label in labels:
                limit = _LIMIT.search(labels)
                samples[f"{name}{{{limit[0]}}}" if limit else name] = float(value)
        return samples

    async def all_away(self) -> bool:
        """Tell whether every proxy goes on without the ledger."""
        return all(values.get("redmesh_proxy_ledger_away") for values in await self._metrics())

    async def served(self, count: int) -> None:
        """Wait until the clients were served `count` times more."""
        aim = self.load.good + count
        await wait_until(lambda: self.load.good >= aim, timeout_s=30, what="traffic goes on")

    async def goes_away(self, *, bound_s: float = NOTICED_BOUND_S) -> None:
        """Wait until every proxy has noticed that Redis is away: within `bound_s` from now.

        When a proxy noticed, it says itself: asking it takes time.
        """
        began_s = time.monotonic()
        await wait_until(self.all_away, timeout_s=10, what="all proxies go on without Redis")
        noticed_s = [
            time.monotonic() - began_s - values["redmesh_proxy_ledger_away_seconds"]
            for values in await self._metrics()
        ]
        took_s = max(0.0, *noticed_s)
        self.figures["noticed"] = f"{took_s:.2f} s"
        assert took_s <= bound_s, self.figures

    async def lasts(self, duration_s: float) -> None:
        """Let the fault last, and hold the proxies to what they may make a request wait."""
        before = await self.choices()
        await asyncio.sleep(duration_s)  # the duration is the fault itself
        during = (await self.choices()).since(before)
        self.figures["away"] = f"{duration_s:g} s"
        self.figures["choice of a replica meanwhile"] = f"{during.mean_s * 1e6:.0f} µs"
        assert during.count > 0, "nobody asked for anything"
        assert during.mean_s < ADDED_BOUND_S, self.figures

    async def is_back(self, primary: Server | None = None) -> None:
        """Note that Redis answers again; the clock of the bounds starts here.

        With `primary` the reservations that count are those made there, and not at another.
        """
        self._returned_s = time.monotonic()
        self._primary = primary
        self._leases = await asyncio.to_thread(self._reserved) if primary else {}
        self._batches = [values.get(_BATCHES, 0) for values in await self._metrics()]

    async def reserves(self) -> bool:
        """Tell whether every proxy has reserved in the ledger since Redis is back."""
        now = await self._metrics()
        used = [
            values.get(_BATCHES, 0) >= before + 2
            for values, before in zip(now, self._batches, strict=True)
        ]
        if not all(used) or any(values.get("redmesh_proxy_ledger_away") for values in now):
            return False
        leases = await asyncio.to_thread(self._reserved)
        return all(leases[proxy] - self._leases.get(proxy, set()) for proxy in leases)

    def _reserved(self) -> dict[str, set[bytes]]:
        """Read which requests hold reservations at the primary, by proxy."""
        if self._primary is None:
            return {}
        keys = Keys().model(self._model)
        proxies = [name.decode() for name in self._primary.command("ZRANGE", keys.px, 0, -1)]
        return {proxy: set(self._primary.command("HKEYS", keys.lease(proxy))) for proxy in proxies}

    async def within(
        self, bound_s: float, what: str, predicate: Callable[[], Awaitable[object] | object]
    ) -> float:
        """Wait for `predicate` until `bound_s` after the return; returns how long it took."""
        left_s = self._returned_s + bound_s - time.monotonic()
        await wait_until(predicate, timeout_s=max(left_s, 0.1), what=what)  # pyright: ignore[reportArgumentType] - either kind of predicate
        took_s = time.monotonic() - self._returned_s
        self.figures[what] = f"{took_s:.2f} s"
        return took_s

    async def heals(self, *, ledger_bound_s: float = CLEAN_BOUND_S) -> None:
        """Wait until every proxy uses the ledger again, and an audit that finds nothing."""
        took_s = await self.within(CLEAN_BOUND_S, "ledger used again", self.reserves)
        assert took_s <= ledger_bound_s, self.figures
        while (done := await self.mesh.ask("audit")).code != 0 or "clean: " not in done.out:
            late = time.monotonic() - self._returned_s > CLEAN_BOUND_S
            assert not late, f"no audit begun within {CLEAN_BOUND_S:g} s is clean: {done}"
        self.figures["audit clean"] = f"{time.monotonic() - self._returned_s:.2f} s"

    def judge(self, name: str) -> Report:
        """Print the figures; no request may have failed, or been sent twice by its client."""
        report = self.load.report()
        shown = ", ".join(f"{what} {value}" for what, value in self.figures.items())
        print(f"\n{name}: {shown}\n{report}")  # noqa: T201 - figures for the reader
        assert (report.ok, report.retried) == (report.count, 0), report
        return report


@contextlib.asynccontextmanager
async def under_load(
    mesh: Mesh, model: str, name: str, *, users: int = 20, tokens: int = 20
) -> AsyncGenerator[Trial]:
    """Begin with a whole mesh and busy users; end with the same engines and an empty ledger."""
    await whole(mesh, model)
    load = Load(mesh.ports, model, max_tokens=tokens)
    async with httpx.AsyncClient(timeout=10) as http:
        trial = Trial(mesh, model, load, http)
        async with mesh.registry() as registry:
            trial.before = await ready_replicas(registry, model)
        async with load.users(users, over_s=0.5):
            await trial.served(users)
            healthy = await trial.choices()
            await trial.served(2 * users)
            mean_s = (await trial.choices()).since(healthy).mean_s
            trial.figures["choice of a replica before"] = f"{mean_s * 1e6:.0f} µs"
            yield trial
            await trial.served(2 * users)
        trial.judge(name)
    async with mesh.registry() as registry:
        await wait_until(lambda: _empty(registry, model), what="no reservation is left")
        after = await ready_replicas(registry, model)
    pids, now = ({rid: r.pid for rid, r in each.items()} for each in (trial.before, after))
    assert now == pids, "engines were stopped, started or lost"


async def whole(mesh: Mesh, model: str) -> None:
    """Wait until every wanted replica is READY, every process beats and somebody leads."""

    async def is_whole() -> bool:
        with contextlib.suppress(Exception):
            async with mesh.registry() as registry:
                file = mesh.file()
                deployment = (await registry.fleet.deployments())[model]
                members = (await registry.fleet.members()).values()
                leads = await registry.connection.command("EXISTS", registry.keys.fleet.leader)
                return (
                    leads == 1
                    and sum(member.seen_ms_ago < 3000 for member in members) >= len(file.children)
                    and len(await ready_replicas(registry, model)) == deployment.replicas
                )
        return False

    await wait_until(is_whole, timeout_s=40, interval_s=0.2, what="the mesh is whole")


async def _empty(registry: Registry, model: str) -> bool:
    totals = await registry.ledger.totals(model)
    return all(total.requests == 0 and total.cost_tokens == 0 for total in totals.values())
