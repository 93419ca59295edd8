"""One seeded history of the ledger: proxies under load, a reaper, a fleet that changes, faults.

What runs is real: the Lua scripts, the registry, the proxy's reservations, beats, live requests and
convergence. What is simulated is time, the network, Redis' storage and the requests themselves.
After each script the totals are held against the leases; when the last fault is two beats past, the
ledger must equal what the proxies relay, and stay equal; when all have settled, it must be empty.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, cast

from services.proxy.beats import Beats
from services.proxy.convergence import Convergence
from services.proxy.metrics import Metrics
from services.proxy.pool import Endpoints
from services.proxy.serving import Fleet, Served
from services.proxy.settings import ProxySettings
from services.proxy.table import Tables
from shared.errors import RegistryError
from shared.lifecycle import Loops, every
from shared.models.deployment import Deployment, DeploymentSpec
from shared.models.replica import Replica, ReplicaState
from shared.models.routing import Lease, ModelSpec
from shared.registry import Registry
from shared.registry.connection import Connection
from shared.registry.keys import Keys
from shared.registry.leadership import Leading
from shared.registry.ledger import BUSY, NONE
from shared.registry.results import Fence
from shared.registry.specs import spec_fields
from shared.secret import Secret
from tests.simulation.faults import Faults
from tests.simulation.luahost import LuaHost
from tests.simulation.redisworld import Client, Command, Link, Node, RedisWorld, Watch
from tests.simulation.rules import BrokenError, Versions, ledger_sums
from tests.simulation.virtual import Process, Timeline

MODEL: Final = "m"
KEYS: Final = Keys("s")
TROUBLED_S: Final = 14.0
"""Faults begin within this time."""
TWO_BEATS_S: Final = 2 * (1.2 + 0.25) + 0.1
"""Two beats at their longest, each after one that Redis never answered."""
REAPED_S: Final = 5.0 + 2.0 + 3 * 1.45
"""Silent, marked, and dropped by a peer's next beat."""
GRACE_S: Final = 2.0


class Figures(NamedTuple):
    """What one history was."""

    seed: int
    scripts: int
    requests: int
    faults: tuple[str, ...]
    clock_steps_ms: tuple[float, ...]
    history: str


class Proxy:
    """One proxy: a real fleet of served models in a process, and requests through it."""

    def __init__(self, sim: "LedgerSim", name: str) -> None:
        self.name = name
        self.link = Link()
        self.process = Process(sim.timeline, name, rate=sim.random.uniform(0.999, 1.001))
        self.fleet: Fleet | None = None
        self.loading = True
        self.asked = 0
        self._over = asyncio.Event()
        self._sim = sim
        self._random = random.Random(sim.random.getrandbits(32))
        self.process.start(self._run())

    @property
    def served(self) -> Served | None:
        """The model, once the catalogue was read."""
        fleet = self.fleet
        table = fleet.tables.get(MODEL) if fleet is not None else None
        return fleet.of(table) if fleet is not None and table is not None else None

    @property
    def known(self) -> Served | None:
        """The model, if it was served already: only within its loop it can begin to be."""
        served = self.fleet._served if self.fleet is not None else {}  # pyright: ignore[reportPrivateUsage] - looks inside
        return served.get(MODEL)

    def registry(self, *, hot: bool) -> Registry:
        """Open a registry over the simulated network."""
        client = Client(self._sim.redis, self.process, self.link, hot=hot)
        return Registry.over(
            Connection(cast("Any", client), self._sim.host.library, shown_url="sim"), KEYS
        )

    async def _run(self) -> None:
        hot, calm = self.registry(hot=True), self.registry(hot=False)
        tables, metrics = Tables(), Metrics()
        convergence = Convergence(
            tables=tables,
            catalogue=calm.fleet,
            snapshots=calm.replicas,
            hints=calm.routes,
            random=self._random,
            table_file=None,
        )
        fleet = self.fleet = Fleet(
            proxy=self.name,
            settings=ProxySettings(fleet_secret=Secret("s")),
            tables=tables,
            ledger=hot.ledger,
            endpoints=Endpoints(Secret("s"), {}, idle_s=1.0, connect_timeout_s=1.0),
            metrics=metrics,
            random=self._random,
            saw_version=convergence.refresh,
        )
        beats = Beats(
            proxy=self.name,
            fleet=fleet,
            ledger=hot.ledger,
            metrics=metrics,
            random=self._random,
        )
        async with Loops() as loops:
            loops.start("hints", convergence.run_hints())
            loops.start("catalogue", convergence.run_catalogue())
            loops.start("snapshots", convergence.run_snapshots())
            loops.start("beats", every(beats.interval_s, beats.beat_all))
            loops.start("load", self._load(fleet))
            await loops.failed()

    def stop(self) -> None:
        """End every request, and ask no more."""
        self.loading = False
        self.process.post(self._over.set)

    async def _load(self, fleet: Fleet) -> None:
        pick = self._random
        async with asyncio.TaskGroup() as requests:
            while self.loading:
                await asyncio.sleep(pick.expovariate(self._sim.rate))
                for _ in range(pick.choice((1, 1, 1, 1, 2, 12)) if self.loading else 0):
                    requests.create_task(self._request(fleet))

    async def _request(self, fleet: Fleet) -> None:
        """Do with a request what an exchange does with its reservation."""
        pick, served = self._random, self.served
        if served is None:
            return
        self.asked += 1
        prompt, output = pick.randrange(1, 500), pick.randrange(1, 300)
        length_s = pick.choice((0.02, 0.3, 1.0, 3.0, 30.0, 40.0)) * pick.random()
        tried: tuple[str, ...] = ()
        for _ in range(4):
            request = f"{self.name}-{fleet.next_number()}"
            rid = await self._reserve(served, request, prompt + output, tried)
            if rid is None:
                return
            if rid in {BUSY, NONE}:
                await asyncio.sleep(pick.uniform(0.025, 0.3))
                continue
            await self._last(min(1.0, length_s * 0.1))
            if rid in self._sim.dead_replicas:
                served.reservations.release(request)
                tried += (rid,)
                continue
            if pick.random() < 0.6:  # others are not streamed: they settle with their end
                served.reservations.settle(request, output)
            await self._last(length_s)
            served.reservations.release(request)
            return

    async def _last(self, length_s: float) -> None:
        """Let a request go on for a while, or until the simulation wants all to end."""
        until_s = self.process.loop.time() + length_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until_s):
                await self._over.wait()

    async def _reserve(
        self, served: Served, request: str, cost: int, tried: tuple[str, ...]
    ) -> str | None:
        """Reserve; a client may leave before there is an answer."""
        answers: asyncio.Queue[str] = asyncio.Queue()
        gone = False

        def answer(result: str) -> None:
            if gone and result not in {BUSY, NONE}:
                served.reservations.release(request)
            answers.put_nowait(result)

        served.reservations.reserve(request, cost, tried, answer)
        if self._random.random() < 0.05:
            try:
                async with asyncio.timeout(self._random.uniform(0, 0.002)):
                    return await answers.get()
            except TimeoutError:
                gone = True
                return None
        return await answers.get()


class Keeper:
    """Controller and agents in one: keeps the fleet as the simulation wants it, through scripts."""

    def __init__(self, sim: "LedgerSim") -> None:
        self._sim = sim
        self.wanted: dict[str, tuple[ReplicaState, int]] = {}
        self.process = Process(sim.timeline, "keeper")
        self._registry = Registry.over(
            Connection(
                cast("Any", Client(sim.redis, self.process, Link(), hot=False)), sim.host.library
            ),
            KEYS,
        )
        self.process.start(self._run())

    async def _run(self) -> None:
        await every(lambda: 0.25, self._keep)

    async def _keep(self) -> None:
        with contextlib.suppress(RegistryError):
            await self._once()

    async def _once(self) -> None:
        registry = self._registry
        leading = await registry.leadership.try_lead("keeper")
        if not isinstance(leading, Leading):
            return
        fence = Fence(leading.epoch, "keeper")
        deployment = Deployment(spec=DeploymentSpec(name=MODEL), generation=1, replicas=3)
        await registry.fleet.declare(MODEL, deployment, 0)
        spec = ModelSpec(model=MODEL, generation=1, max_requests=self._sim.max_requests)
        await registry.specs.write(fence, MODEL, spec_fields(spec))
        found = (await registry.replicas.snapshot(MODEL)).replicas
        for rid, (state, cap) in self.wanted.items():
            replica = found.get(rid)
            if replica is None:
                record = Replica(
                    rid=rid,
                    model=MODEL,
                    gen=1,
                    state=state,
                    host="h",
                    revision="r",
                    url="http://h:1",
                    max_requests=cap,
                    capacity=self._sim.random.choice((0.5, 1.0, 1.0, 3.0)),
                )
                await registry.replicas.register(record)
            elif replica.state is not state:
                await registry.replicas.transition(
                    rid, MODEL, gen=1, expect=replica.state, to=state, fence=fence
                )
            elif replica.max_requests != cap:
                await registry.replicas.patch(
                    rid, MODEL, gen=1, patch={"max_requests": cap}, fence=fence
                )


class LedgerSim(Watch):
    """One history."""

    def __init__(self, host: LuaHost, seed: int, theme: str = "") -> None:
        random.seed(seed)  # the registry's own jitter
        self.seed = seed
        self.theme = theme
        """Kind of faults, see `Faults`; empty lets the seed choose."""
        self.random = random.Random(seed)
        self.host = host
        self.timeline = Timeline()
        self.redis = RedisWorld(self.timeline, host, random.Random(self.random.getrandbits(32)))
        self.redis.watch = self
        self.rate = self.random.choice((0.5, 1.0, 3.0))
        self.max_requests = self.random.choice((4, 60, 100_000))
        self.dead_replicas: set[str] = set()
        self.frozen: dict[str, Proxy] = {}
        self._beaten: dict[str, tuple[float, float | None]] = {}
        """Proxy → when its last beat was executed, and how Redis noted it."""
        self._answering: Node | None = None
        self._read_s: dict[str, float] = {}
        """Proxy → when it first read what there is: from then on it beats."""
        self.versions = Versions("version")
        self.keys = KEYS.model(MODEL)
        self.keeper = Keeper(self)
        self.keeper.wanted = {
            f"r{n}": (ReplicaState.READY, self.random.choice((1, 4, 256)))
            for n in range(self.random.choice((1, 2, 4)))
        }
        self.proxies = [Proxy(self, f"p{n}") for n in range(self.random.choice((2, 3, 4)))]
        self._checks: list[Callable[[], None]] = []

    def alive(self) -> list[Proxy]:
        """Give the proxies that were not killed."""
        return [proxy for proxy in self.proxies if not proxy.process.dead]

    def executed(self, node: Node, client: Client, command: Command, reply: object) -> None:
        """Check the data after each script that changes it."""
        if command[0] not in {"EVALSHA", "EVAL"} or node is not self.redis.primary:
            return
        script = self.script(command)
        args = command[3 + int(command[2]) :]
        if node is not self._answering:
            self._forget(node)
        if script == "replica/snapshot":
            self._read_s.setdefault(client.process.name, self.timeline.now_s)
        if script.startswith("ledger/"):
            self._owner(node, script, client, args, cast("list[Any]", reply))
        ledger_sums(node.store, self.keys)
        self.versions.seen(id(node), node.store.text(self.keys.ver))

    def script(self, command: Command) -> str:
        """Name the script of a command."""
        return self.host.name_of(command)

    def _forget(self, node: Node) -> None:
        """Forget the beats that a new primary does not know: to it, those proxies were silent."""
        self._answering = node
        noted = node.store.zset(self.keys.px)
        self._beaten = {
            name: beaten for name, beaten in self._beaten.items() if noted.get(name) == beaten[1]
        }

    def _owner(
        self, node: Node, script: str, client: Client, args: Command, reply: list[Any]
    ) -> None:
        now_s = self.timeline.now_s
        if script == "ledger/beat":
            self._beaten[args[0]] = (now_s, node.store.zset(self.keys.px).get(args[0]))
        elif script == "ledger/suspects":
            for name in reply[1:]:
                # The worst moment to come back: between being named and being reaped.
                if name.decode() in self.frozen and self.random.random() < 0.5:
                    self.frozen[name.decode()].process.frozen = False
        elif script == "ledger/reap" and reply[0] == b"OK" and reply[1]:
            silent_s = now_s - self._beaten.get(args[0], (-1e9, None))[0]
            if silent_s < GRACE_S:
                raise BrokenError(
                    f"{client.name} reaped {args[0]}, which beat {silent_s:.3f} s ago"
                )

    def drift(self, proxy: Proxy) -> str | None:
        """Say what the ledger has wrong of a proxy, apart from what is under way."""
        served = proxy.known
        leases = self._leases(proxy.name)
        if served is None:
            return None
        # Compared here, not by the proxy's own code: an error in that must not hide itself.
        under_way = served.reservations.unsettled
        live = {
            request: (holding.rid, holding.cost_tokens)
            for request, holding in served.reservations.live.items()
        }
        held = {request: (lease.rid, lease.cost_tokens) for request, lease in leases.items()}
        wrong = {
            request: (held.get(request), live.get(request))
            for request in live.keys() | held.keys()
            if live.get(request) != held.get(request) and request not in under_way
        }
        return f"{proxy.name}: request: (ledger, live): {wrong}" if wrong else None

    def _leases(self, proxy: str) -> Mapping[str, Lease]:
        leases: dict[str, Lease] = {}
        for request, text in self.redis.primary.store.hash(self.keys.lease(proxy)).items():
            rid, _, cost = text.partition(" ")
            leases[request] = Lease(request=request, rid=rid, cost_tokens=int(cost))
        return leases

    def run(self) -> Figures:
        """Live through it. Raises BrokenError, or the error of any process."""
        try:
            return self._run()
        finally:
            self.timeline.close()

    def _run(self) -> Figures:
        timeline = self.timeline
        timeline.run_until(3.0)
        faults = Faults(self)
        faults.plan(3.0, TROUBLED_S)
        timeline.run_until(TROUBLED_S + 0.001)
        while timeline.now_s < self.redis.calm_from_s + TWO_BEATS_S:
            timeline.run_until(self.redis.calm_from_s + TWO_BEATS_S)
        timeline.after_step = self._true
        timeline.run_until(timeline.now_s + 3.0)
        timeline.after_step = lambda: None
        until_s = self.redis.calm_from_s + REAPED_S
        timeline.run_until(max(until_s, timeline.now_s))
        dead = [proxy.name for proxy in self.proxies if proxy.process.dead]
        for name in dead:
            if leaked := self._leases(name):
                raise BrokenError(f"{len(leaked)} reservations of dead {name} leaked")
        for proxy in self.alive():
            proxy.stop()
        timeline.run_until(timeline.now_s + 4.0)
        left = {proxy.name: dict(self._leases(proxy.name)) for proxy in self.proxies}
        if any(left.values()):
            raise BrokenError(f"reservations leaked: {left}")
        return Figures(
            self.seed,
            self.redis.executions,
            sum(proxy.asked for proxy in self.proxies),
            tuple(faults.done),
            tuple(self.redis.clock_steps_ms),
            self.redis.history.hexdigest(),
        )

    def _true(self) -> None:
        """Two beats after the last fault the ledger equals the live requests, and stays equal.

        A proxy that was started within it has not beaten yet, and gets two beats of its own.
        """
        now_s = self.timeline.now_s
        for proxy in self.alive():
            if now_s - self._read_s.get(proxy.name, now_s) < TWO_BEATS_S:
                continue
            if wrong := self.drift(proxy):
                raise BrokenError(f"{self.timeline.now_s:.3f} s: {wrong}")
