"""One cut under load: what was before it, what happens meanwhile, and what is asked afterwards."""

import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

from shared.models.replica import Replica
from shared.registry import Registry
from tests.partitions.fleet import MODEL, PROXIES, REPLICAS, Fleet, same_tables, whole
from tests.support.mesh import ready_replicas
from tests.support.streams import Load, Report
from tests.support.waiting import wait_until

USERS = 24
TOKENS = 25
HEALED_S = 10.0


class Trial:
    """A whole mesh with busy users, on which a test works."""

    def __init__(self, fleet: Fleet, registry: Registry, load: Load) -> None:
        self.fleet = fleet
        self.registry = registry
        self.load = load
        self.before: dict[str, Replica] = {}
        self.figures: dict[str, float] = {}
        self._since_s = 0.0

    def mark(self) -> None:
        """Count bounds and figures from now on: something has been cut, or healed."""
        self._since_s = time.monotonic()

    async def within(
        self,
        bound_s: float,
        what: str,
        predicate: Callable[[], object] | Callable[[], Awaitable[object]],
    ) -> None:
        """Wait for `predicate` until `bound_s` after the last mark, and note how long it took."""
        left_s = self._since_s + bound_s - time.monotonic()
        await wait_until(predicate, timeout_s=max(left_s, 0.1), what=what)
        self.figures[what] = time.monotonic() - self._since_s

    async def goes_on(self, count: int = USERS) -> None:
        """Wait until the clients were served `count` times more."""
        aim = self.load.good + count
        await wait_until(lambda: self.load.good >= aim, timeout_s=20, what="traffic goes on")

    async def healed(self) -> None:
        """Within ten seconds of healing the accounts agree, and so do all tables."""
        self.mark()
        await self.within(HEALED_S, "tables equal", lambda: same_tables(self.registry))
        while (done := await self.fleet.ask("audit")).code != 0:
            late = time.monotonic() - self._since_s > HEALED_S
            assert not late, f"no audit begun within {HEALED_S:g} s is clean: {done}"
        self.figures["audit clean"] = time.monotonic() - self._since_s

    async def same_engines(self) -> None:
        """Assert that every replica is the process it was, and was READY all the time."""
        now = await ready_replicas(self.registry, MODEL)
        before, after = (
            {rid: (r.pid, r.gen, r.since_ms) for rid, r in replicas.items()}
            for replicas in (self.before, now)
        )
        assert before == after

    def report(self) -> Report:
        """Print and return what the load came to."""
        report = self.load.report()
        times = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in self.figures.items())
        print(f"\nafter the last cut or healing: {times}\n{report}")  # noqa: T201 - figures for the reader
        return report


@contextlib.asynccontextmanager
async def under_load(
    fleet: Fleet, *, users: int = USERS, tokens: int = TOKENS
) -> AsyncGenerator[Trial]:
    """Begin with a whole mesh and busy users; end with an empty ledger."""
    async with fleet.registry() as registry:
        load = Load(
            tuple(PROXIES.values()), MODEL, max_tokens=tokens, hosts=fleet.addresses, timeout_s=30
        )
        trial = Trial(fleet, registry, load)
        await wait_until(lambda: whole(registry, REPLICAS), timeout_s=40, what="the mesh is whole")
        async with load.users(users, over_s=1.0):
            await trial.goes_on()
            trial.before = await ready_replicas(registry, MODEL)
            yield trial
            await trial.goes_on()
        await wait_until(lambda: _empty(registry), what="no reservation is left")


async def _empty(registry: Registry) -> bool:
    totals = await registry.ledger.totals(MODEL)
    return all(total.requests == 0 and total.cost_tokens == 0 for total in totals.values())
