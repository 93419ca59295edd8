"""One seeded history of the leader protocol: controllers that are frozen, killed and cut off.

The controllers are real (campaign, fences, observe, plan, act) over the real scripts; agents are
small ones that run engines in memory. After each script it is checked that no write of an older
leadership was accepted once a newer one had written or read, that an epoch has one owner and never
comes twice, and that two controllers never believe at once that they may act. When all is calm, one
leads, and what runs is what is wanted.
"""

import contextlib
import random
import re
from functools import partial
from typing import Any, Final, cast
from unittest.mock import patch

from services.controller.app import Controller
from services.controller.settings import ControllerSettings
from shared import ids
from shared.errors import RegistryError
from shared.lifecycle import Loops, every
from shared.models.deployment import Deployment, DeploymentSpec, EngineKind, EngineSpec
from shared.models.host import Host, Member, MemberKind
from shared.models.order import Order, OrderAction
from shared.models.replica import ENDED, Replica, ReplicaState
from shared.registry import Registry
from shared.registry.connection import Connection
from shared.registry.keys import Keys
from shared.registry.replicas import ReplicaBeat
from shared.registry.results import Refused
from shared.secret import Secret
from tests.simulation.luahost import LuaHost
from tests.simulation.redisworld import Client, Command, Link, Node, RedisWorld, Watch
from tests.simulation.rules import BrokenError, Versions
from tests.simulation.virtual import Process, Timeline

MODEL: Final = "m"
KEYS: Final = Keys("s")
TTL_MS: Final = 5000
TROUBLED_S: Final = 30.0
ELECTED_S: Final = 1.5 * TTL_MS / 1000
"""After the last fault somebody leads within this time."""
CALM_S: Final = 30.0
"""Then what is wanted runs: silent replicas are judged after ten seconds, and settling takes three.
"""
STATE: Final = re.compile(r'"state":"(\w+)"')
REFUSALS: Final = {b"FENCED", b"EXISTS", b"ILLEGAL", b"ABSENT", b"STALEGEN", b"CONFLICT"}


def fence_arguments(host: LuaHost) -> dict[str, tuple[int, int]]:
    """Find in each script's header where its ARGV has epoch and owner."""
    places: dict[str, tuple[int, int]] = {}
    for name in host.library.names:
        text = host.library[name].text
        epoch = re.search(r"^--   (\d+) epoch: fencing number", text, re.MULTILINE)
        owner = re.search(r"^--   (\d+) owner: name", text, re.MULTILINE)
        if epoch and owner:
            places[name] = (int(epoch[1]) - 1, int(owner[1]) - 1)
    return places


class Prober:
    """Engines answer the leader's own question while they run."""

    def __init__(self, sim: "LeaderSim") -> None:
        self._sim = sim

    async def answers(self, replica: Replica) -> bool:
        """Tell whether the engine runs."""
        return any(replica.rid in agent.engines for agent in self._sim.agents)


class Candidate:
    """One controller in a process."""

    def __init__(self, sim: "LeaderSim", name: str) -> None:
        self.name = name
        self.link = Link()
        self.process = Process(sim.timeline, name, rate=sim.random.uniform(0.999, 1.001))
        self.controller: Controller | None = None
        self._sim = sim
        self.process.start(self._run())

    @property
    def leads(self) -> bool:
        """Tell whether this process believes that it may act now."""
        controller = self.controller
        return controller is not None and controller.leader.reign() is not None

    async def _run(self) -> None:
        registry = self._sim.registry(self.process, self.link)
        settings = ControllerSettings(fleet_secret=Secret("s"), lease_ttl_ms=TTL_MS)
        controller = Controller(settings, registry, Prober(self._sim), self.process, self.name)
        self.controller = controller
        member = Member(
            kind=MemberKind.CONTROLLER,
            id=self.name,
            host="h",
            pid=1,
            version="0",
            started_ms=self.process.now_ms(),
        )
        async with Loops() as loops:
            controller.start(loops, member)
            await loops.failed()


class Agent:
    """Runs engines in memory by its orders, and registers them again when Redis forgot them."""

    def __init__(self, sim: "LeaderSim", name: str) -> None:
        self.name = name
        self.link = Link()
        self.process = Process(sim.timeline, name)
        self.engines: dict[str, Replica] = {}
        self._registry = sim.registry(self.process, self.link)
        self.process.start(every(lambda: 1.0, self._look))

    async def _look(self) -> None:
        with contextlib.suppress(RegistryError):
            await self._obey()

    async def _obey(self) -> None:
        fleet = self._registry.fleet
        await fleet.put_host(
            Host(host=self.name, address="h", cpus=8, memory_bytes=1 << 40, engines=("sim",))
        )
        await fleet.beat(
            Member(
                kind=MemberKind.AGENT,
                id=self.name,
                host=self.name,
                pid=1,
                version="0",
                started_ms=1,
            )
        )
        for order in (await fleet.orders(self.name)).values():
            await self._follow(order)
        for rid, replica in list(self.engines.items()):
            beat = ReplicaBeat(rid=rid, gen=replica.gen)
            if await self._registry.replicas.heartbeat(MODEL, [beat]):
                outcome = await self._registry.replicas.register(replica)
                if isinstance(outcome, Refused):  # of another incarnation: that one is right
                    del self.engines[rid]

    async def _follow(self, order: Order) -> None:
        replicas = self._registry.replicas
        record = (await replicas.snapshot(MODEL)).replicas.get(order.rid)
        if record is None or record.gen != order.gen:
            return
        to: ReplicaState | None = None
        if order.action is OrderAction.RUN:
            to = {
                ReplicaState.PENDING: ReplicaState.STARTING,
                ReplicaState.STARTING: ReplicaState.READY,
            }.get(record.state)
        elif record.state is ReplicaState.DRAINING:
            to = ReplicaState.STOPPED
            self.engines.pop(order.rid, None)
        if record.state in ENDED:
            self.engines.pop(order.rid, None)
        if to is None:
            return
        url = f"http://{self.name}:1"
        written = await replicas.transition(
            order.rid,
            MODEL,
            gen=order.gen,
            expect=record.state,
            to=to,
            patch={"url": url},
            fence=None,
        )
        if to is ReplicaState.READY and not isinstance(written, Refused):
            after = (await replicas.snapshot(MODEL)).replicas.get(order.rid)
            if after is not None and after.state is ReplicaState.READY:
                self.engines[order.rid] = after


class LeaderSim(Watch):
    """One history."""

    def __init__(self, host: LuaHost, seed: int) -> None:
        random.seed(seed)  # the controllers' own jitter
        self.seed = seed
        self.random = random.Random(seed)
        self.host = host
        self.timeline = Timeline()
        self.redis = RedisWorld(self.timeline, host, random.Random(self.random.getrandbits(32)))
        self.redis.watch = self
        self.kind = self.random.choice(("plain", "plain", "data lost", "clock stepped"))
        """Where Redis keeps data and clock, two leaders at once are an error. The last two are not
        mixed: a clock that went back and a server that forgot can together give a number twice.
        """
        self.faults: list[str] = []
        self.elections = 0
        self.wanted = 2
        self._places = fence_arguments(host)
        self._owners: dict[int, str] = {}
        self._lineage: dict[int, int] = {}
        self._accepted: dict[tuple[int, str], int] = {}
        self._read: dict[tuple[int, str], int] = {}
        self._epochs = Versions("epoch")
        self._told: list[Candidate] = []
        self._until_struck = 0
        self._redis_free_s = 0.0
        self.agents = [Agent(self, f"h{n}") for n in range(2)]
        self.candidates = [Candidate(self, f"c{n}") for n in range(self.random.choice((2, 3)))]
        self._operator = Process(self.timeline, "operator")
        self._declarations = self.registry(self._operator, Link())
        self._operator.start(every(lambda: 0.5, self._declare))

    def registry(self, process: Process, link: Link) -> Registry:
        """Open a registry over the simulated network."""
        client = Client(self.redis, process, link, hot=False)
        return Registry.over(Connection(cast("Any", client), self.host.library), KEYS)

    async def _declare(self) -> None:
        """Declare what is wanted, again and again, as operators do after a loss of data."""
        with contextlib.suppress(RegistryError):
            fleet = self._declarations.fleet
            found = (await fleet.deployments()).get(MODEL)
            generation = found.generation if found else 0
            if found is None or found.replicas != self.wanted:
                spec = DeploymentSpec(name=MODEL, engine=EngineSpec(kind=EngineKind.SIM))
                deployment = Deployment(spec=spec, generation=generation + 1, replicas=self.wanted)
                await fleet.declare(MODEL, deployment, generation)

    # what is always true

    def executed(self, node: Node, client: Client, command: Command, reply: object) -> None:
        """Check every election, every fenced write and every reading of a leader."""
        if node is not self.redis.primary:
            return
        if command[0] not in {"EVALSHA", "EVAL"}:
            return
        script = self.host.name_of(command)
        args = command[3 + int(command[2]) :]
        status = cast("list[Any]", reply)[0] if isinstance(reply, list) else b""
        if script == "leader/lead" and status == b"LEADING":
            self._elected(node, int(cast("list[Any]", reply)[1]), args[0])
        elif script in self._places and status not in REFUSALS:
            at, by = self._places[script]
            if args[at]:
                scope = MODEL if "{m}" in command[3] else "ctl"
                self._wrote(node, scope, int(args[at]), args[by], script)
        elif script == "replica/snapshot":
            self._reads(node, client)

    def _elected(self, node: Node, epoch: int, owner: str) -> None:
        if self._owners.setdefault(epoch, owner) != owner:
            raise BrokenError(f"epoch {epoch} was {self._owners[epoch]}'s and is {owner}'s")
        if epoch not in self._lineage:
            self.elections += 1
            self._lineage[epoch] = id(node)
        self._epochs.seen(id(node), str(epoch))

    def _wrote(self, node: Node, scope: str, epoch: int, owner: str, script: str) -> None:
        if self._owners.setdefault(epoch, owner) != owner:
            raise BrokenError(
                f"{script} of {owner} accepted with the epoch of {self._owners[epoch]}"
            )
        place = (id(node), scope)
        newest = max(self._accepted.get(place, 0), self._read.get(place, 0))
        if epoch < newest:
            raise BrokenError(f"{script} of {owner} (epoch {epoch}) accepted after epoch {newest}")
        self._accepted[place] = epoch

    def _reads(self, node: Node, client: Client) -> None:
        for candidate in self.candidates:
            if candidate.process is client.process and candidate.controller is not None:
                reign = candidate.controller.leader.reign()
                if reign is not None and self._lineage.get(reign.epoch) == id(node):
                    place = (id(node), MODEL)
                    fence = int(node.store.hash(KEYS.model(MODEL).fence).get("epoch", "0"))
                    if 0 < fence < reign.epoch:
                        raise BrokenError(f"{candidate.name} reads before its fence: {fence}")
                    self._read[place] = max(self._read.get(place, 0), reign.epoch)

    def answered(self, client: Client, command: Command, reply: object) -> None:
        """Note who has just been told that another leads."""
        del command
        told = isinstance(reply, list) and cast("list[Any]", reply)[0] == b"FOLLOWING"
        self._told += [each for each in self.candidates if told and each.process is client.process]

    def _look(self) -> None:
        told, self._told = self._told, []
        for each in told:
            if each.leads:
                raise BrokenError(f"{each.name} acts on though it was told that another leads")
        if self.kind == "plain":
            self._one_acts()

    def _one_acts(self) -> None:
        acting = [
            each.name
            for each in self.candidates
            if not each.process.dead and not each.process.frozen and each.leads
        ]
        if len(acting) > 1:
            raise BrokenError(
                f"{self.timeline.now_s:.3f} s: {' and '.join(acting)} may act at once"
            )

    # what happens

    def run(self) -> "LeaderSim":
        """Live through it. Raises BrokenError, or the error of any process."""
        names = random.Random(self.seed)
        try:
            with patch.object(ids, "new_suffix", lambda: f"{names.getrandbits(24):06x}"):
                self._run()
        finally:
            self.timeline.close()
        return self

    def _run(self) -> None:
        timeline, pick = self.timeline, self.random
        timeline.after_step = self._look
        timeline.run_until(3.0)
        kinds = [self._freeze, self._kill, self._cut, self._lose, self._slow]
        kinds += [
            self._scale,
            *[self._answers_late] * 3,
            self._freeze_redis,
            self._flush,
            *[self._ambush] * 6,
        ]
        kinds += [self._fail_over, self._empty, self._empty] * 4 if self.kind == "data lost" else []
        kinds += [self._step_clock] * 8 if self.kind == "clock stepped" else []
        for _ in range(pick.randrange(3, 9)):
            timeline.at(pick.uniform(3.0, TROUBLED_S), self._noted(pick.choice(kinds)))
        timeline.run_until(TROUBLED_S + 0.001)
        while timeline.now_s < self.redis.calm_from_s + ELECTED_S:
            timeline.run_until(self.redis.calm_from_s + ELECTED_S)
        if not any(each.leads for each in self._alive()):
            raise BrokenError(f"nobody leads {ELECTED_S:g} s after the last fault")
        timeline.run_until(timeline.now_s + CALM_S)
        self._wanted_runs()

    def _wanted_runs(self) -> None:
        store = self.redis.primary.store
        found = map(STATE.search, store.hash(KEYS.model(MODEL).replicas).values())
        states = [match[1] for match in found if match is not None]
        ready = states.count("READY")
        running = sum(len(agent.engines) for agent in self.agents)
        if not ready == running == self.wanted:
            raise BrokenError(
                f"{self.wanted} are wanted, {ready} are READY, {running} run: {states}"
            )

    def _noted(self, act: Any) -> Any:  # noqa: ANN401 - a method without arguments
        def run() -> None:
            self.faults.append(f"{self.timeline.now_s:.2f} {act.__name__.strip('_')}")
            act()

        return run

    def _alive(self) -> list[Candidate]:
        return [each for each in self.candidates if not each.process.dead]

    def _somebody(self) -> Candidate:
        """Choose the leader, mostly."""
        alive = self._alive()
        leading = [each for each in alive if each.leads]
        return leading[0] if leading and self.random.random() < 0.7 else self.random.choice(alive)

    def _lasts(self, *choices: float) -> float:
        for_s = self.random.choice(choices) * self.random.uniform(0.7, 1.4)
        self.redis.trouble(self.timeline.now_s + for_s)
        return for_s

    def _ambush(self) -> None:
        """Strike the leader in the middle of its next plan, when it has something to write."""
        self.wanted = self.random.choice([n for n in (1, 2, 3, 4) if n != self.wanted])
        self._until_struck = self.random.randrange(1, 6)
        self._lasts(2.0)

    def sending(self, client: Client, command: Command) -> None:
        """Strike: what the leader writes now arrives when its lease is long over, or it freezes."""
        if not self._until_struck or self.host.name_of(command) not in self._places:
            return
        for each in self._alive():
            if each.process is client.process and each.leads:
                self._until_struck -= 1
                if not self._until_struck:
                    for_s = self._lasts(6.0, 8.0, 10.0)
                    each.link.held_until_s = self.timeline.now_s + for_s
                    if self.random.random() < 0.3:
                        self.timeline.after(0.0, partial(self._freeze, each))

    def _freeze(self, who: Candidate | None = None) -> None:
        process = (who or self._somebody()).process
        if process.frozen:
            return
        process.frozen = True

        def thaw() -> None:
            process.frozen = False

        self.timeline.after(self._lasts(1.0, 4.0, 8.0, 12.0), thaw)

    def _kill(self) -> None:
        victim = self._somebody()
        victim.process.kill()
        self._lasts(0.1)
        self.candidates.append(Candidate(self, f"c{len(self.candidates)}"))

    def _link(self, for_s: float, **changes: object) -> None:
        link = self._somebody().link
        for name, value in changes.items():
            setattr(link, name, value)
        self.timeline.after(for_s, link.mend)

    def _cut(self) -> None:
        self._link(self._lasts(2.0, 6.0, 10.0), cut=True)

    def _lose(self) -> None:
        self._link(
            self._lasts(3.0, 8.0),
            lose_request=self.random.choice((0.0, 0.3)),
            lose_reply=self.random.choice((0.0, 0.4, 1.0)),
            late=0.4,
        )

    def _answers_late(self) -> None:
        """Answers take long, and then there are none."""
        link = self._somebody().link
        link.answers_late_s = self.random.uniform(1.5, 1.95)

        def cut() -> None:
            link.cut = True

        self.timeline.after(self.random.uniform(3.0, 6.0), cut)
        self.timeline.after(self._lasts(14.0), link.mend)

    def _slow(self) -> None:
        self._link(self._lasts(3.0, 8.0), slow_ms=self.random.choice((200.0, 600.0, 1500.0)))

    def _scale(self) -> None:
        self.wanted = self.random.choice((1, 2, 3, 4))
        self._lasts(0.5)

    def _redis_is_free(self, for_s: float) -> bool:
        now_s = self.timeline.now_s
        free, self._redis_free_s = now_s >= self._redis_free_s, now_s + for_s
        return free

    def _freeze_redis(self) -> None:
        if self._redis_is_free(5.0):
            self.redis.freeze(self._lasts(0.3, 2.0, 4.0))

    def _flush(self) -> None:
        self.redis.forget_scripts()

    def _fail_over(self) -> None:
        if self._redis_is_free(10.0):
            self.redis.fail_over(
                self.random.choice((0.01, 1.0, 3.0)),
                self.random.uniform(0.1, 3.0),
                planned=self.random.random() < 0.5,
            )

    def _step_clock(self) -> None:
        if self._redis_is_free(10.0):
            by_ms = self.random.choice((3000.0, 9000.0, 3_600_000.0))
            self.redis.step_clock(by_ms * self.random.choice((-1, 1)))

    def _empty(self) -> None:
        if self._redis_is_free(10.0):
            self.redis.restart(self.random.choice((0.1, 0.5, 3.0)), keep=False)
