"""What befalls a simulated fleet: a seeded plan of faults, each with an end."""

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Final

from shared.models.replica import ReplicaState

if TYPE_CHECKING:
    from tests.simulation.ledgersim import LedgerSim, Proxy

HOUR_MS: Final = 3_600_000.0


class Faults:
    """The faults of one history."""

    def __init__(self, sim: "LedgerSim") -> None:
        self.done: list[str] = []
        self._sim = sim
        self._random: Random = Random(sim.random.getrandbits(32))
        self._redis_busy_s = 0.0

    def plan(self, from_s: float, until_s: float) -> None:
        """Schedule some faults between two moments, most of one theme."""
        pick = self._random
        network = {"link cut": self._cut, "link lossy": self._lossy, "link slow": self._slow}
        network["link repeats"] = self._repeats
        proxies = {
            "proxy frozen": self._freeze_proxy,
            "proxy killed": self._kill_proxy,
            "proxy started": self._start_proxy,
        }
        server = {
            "redis frozen": self._freeze_redis,
            "redis restarted": self._restart_redis,
            "scripts flushed": self._flush_scripts,
        }
        data = {"redis emptied": self._empty_redis, "redis failed over": self._fail_over}
        clock = {"clock stepped": self._step_clock}
        fleet = {
            "replica moved": self._move_replica,
            "replica reweighed": self._reweigh,
            "replica died": self._kill_replica,
        }
        # A clock that went back and a server that forgot can together give a version twice: so
        # no history has both.
        themes: dict[str, dict[str, Callable[[], None]]] = {
            "network": network,
            "losses": {"link lossy": self._lossy},
            "repeats": {"link repeats": self._repeats},
            "slowness": {"link slow": self._slow},
            "proxies": proxies,
            "proxies, clock": proxies | clock,
            "server, clock": server | clock,
            "fleet, clock": fleet | clock | proxies,
            "fleet, data": fleet | data,
            "proxies, data": proxies | data | network,
            "all, data": network | proxies | server | data | fleet,
            "all, clock": network | proxies | server | clock | fleet,
        }
        theme = pick.choice(list(themes))
        kinds = list(themes[self._sim.theme or theme].items())
        for _ in range(pick.randrange(5, 15)):
            name, act = pick.choice(kinds)
            self._sim.timeline.at(pick.uniform(from_s, until_s), self._noted(name, act))

    def _noted(self, name: str, act: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            self.done.append(f"{self._sim.timeline.now_s:.2f} {name}")
            act()

        return run

    def _redis_free(self, for_s: float) -> bool:
        """One fault of the server at a time."""
        now_s = self._sim.timeline.now_s
        if now_s < self._redis_busy_s:
            return False
        self._redis_busy_s = now_s + for_s
        return True

    def _any_proxy(self) -> "Proxy | None":
        alive = [p for p in self._sim.alive() if not p.process.frozen]
        return self._random.choice(alive) if alive else None

    def _freeze_proxy(self) -> None:
        proxy = self._any_proxy()
        if proxy is None:
            return
        for_s = self._random.choice((0.2, 2.0, 8.0, 9.0)) * self._random.uniform(0.5, 1.5)
        proxy.process.frozen = True
        self._sim.frozen[proxy.name] = proxy
        self._sim.redis.trouble(self._sim.timeline.now_s + for_s)

        def thaw() -> None:
            proxy.process.frozen = False

        self._sim.timeline.after(for_s, thaw)

    def _kill_proxy(self) -> None:
        proxy = self._any_proxy()
        if proxy is not None and len(self._sim.alive()) > 1:
            proxy.process.kill()
            self._sim.redis.trouble(self._sim.timeline.now_s)

    def _start_proxy(self) -> None:
        from tests.simulation.ledgersim import Proxy  # noqa: PLC0415 - each knows the other

        if len(self._sim.proxies) < 6:
            self._sim.proxies.append(Proxy(self._sim, f"p{len(self._sim.proxies)}"))
            self._sim.redis.trouble(self._sim.timeline.now_s)

    def _freeze_redis(self) -> None:
        for_s = self._random.choice((0.15, 0.5, 4.0, 6.0)) * self._random.uniform(0.5, 1.5)
        if self._redis_free(for_s):
            self._sim.redis.freeze(for_s)

    def _restart_redis(self) -> None:
        for_s = self._random.uniform(0.1, 4.0)
        if self._redis_free(for_s):
            self._sim.redis.restart(for_s, keep=True)

    def _empty_redis(self) -> None:
        for_s = self._random.uniform(0.1, 4.0)
        if self._redis_free(for_s):
            self._sim.redis.restart(for_s, keep=False)
            # Until the controller has declared the model anew, nobody beats for it.
            self._sim.redis.trouble(self._sim.timeline.now_s + for_s + 1.0)

    def _fail_over(self) -> None:
        lag_s, for_s = self._random.choice((0.01, 0.5, 3.0)), self._random.uniform(0.05, 3.0)
        if self._redis_free(lag_s + for_s):
            self._sim.redis.fail_over(lag_s, for_s, planned=self._random.random() < 0.5)

    def _step_clock(self) -> None:
        if self._redis_free(8.0):  # two steps within one grace would be two faults at once
            by_ms = self._random.choice((50.0, 3000.0, 8000.0, 8000.0, HOUR_MS, HOUR_MS))
            self._sim.redis.step_clock(by_ms * self._random.choice((-1, 1)))

    def _flush_scripts(self) -> None:
        self._sim.redis.forget_scripts()

    def _link(self, change: Callable[["Proxy"], None], for_s: float) -> None:
        """Change the network of some proxies for a while."""
        alive = self._sim.alive()
        some = alive if self._random.random() < 0.3 else alive[: self._random.randrange(1, 3)]
        for proxy in some:
            change(proxy)
            self._sim.timeline.after(for_s, proxy.link.mend)
        self._sim.redis.trouble(self._sim.timeline.now_s + for_s)

    def _cut(self) -> None:
        def change(proxy: "Proxy") -> None:
            proxy.link.cut = True

        self._link(change, self._random.choice((0.5, 4.0, 9.0)) * self._random.uniform(0.5, 1.5))

    def _lossy(self) -> None:
        shares = self._random.choice(
            ((0.05, 0.0), (0.1, 0.0), (0.0, 0.1), (0.3, 0.0), (0.2, 0.2), (0.0, 1.0))
        )

        def change(proxy: "Proxy") -> None:
            proxy.link.lose_request, proxy.link.lose_reply = shares
            proxy.link.late = shares[0]
            proxy.link.twice = 0.2

        self._link(change, self._random.uniform(0.3, 5.0))

    def _repeats(self) -> None:
        def change(proxy: "Proxy") -> None:
            proxy.link.twice = 0.3

        self._link(change, self._random.uniform(2.0, 5.0))

    def _slow(self) -> None:
        slow_ms = self._random.choice((20.0, 45.0, 45.0, 80.0, 150.0))

        def change(proxy: "Proxy") -> None:
            proxy.link.slow_ms = slow_ms

        self._link(change, self._random.uniform(0.3, 5.0))

    def _replica(self) -> str:
        wanted = self._sim.keeper.wanted
        moving = (ReplicaState.READY, ReplicaState.UNHEALTHY)
        return self._random.choice([rid for rid in wanted if wanted[rid][0] in moving])

    def _move_replica(self) -> None:
        wanted, rid = self._sim.keeper.wanted, self._replica()
        state, cap = wanted[rid]
        to = ReplicaState.READY
        if state is ReplicaState.READY:
            to = ReplicaState.UNHEALTHY
            if len(wanted) > 1 and self._random.random() < 0.2:
                wanted[f"{rid}y"] = (ReplicaState.READY, 256)
                to = ReplicaState.DRAINING
        wanted[rid] = (to, cap)

    def _reweigh(self) -> None:
        wanted, rid = self._sim.keeper.wanted, self._replica()
        wanted[rid] = (wanted[rid][0], self._random.choice((0, 1, 3, 256)))

    def _kill_replica(self) -> None:
        wanted, rid = self._sim.keeper.wanted, self._replica()
        if wanted[rid][0] in {ReplicaState.FAILED, ReplicaState.STOPPED}:
            return
        self._sim.dead_replicas.add(rid)
        wanted[rid] = (ReplicaState.FAILED, wanted[rid][1])
        wanted[f"{rid}x"] = (ReplicaState.READY, 256)
