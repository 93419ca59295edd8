"""Seeded random interleavings of several proxies, a controller and lost replies on one model.

After each step everything that Redis holds of the ledger is compared with the Python model. What is
random comes from the seed alone, so a failure is replayed by its seed.
"""

import itertools
import random
from typing import Any

from shared.models.replica import ReplicaState
from shared.registry import Registry
from shared.registry.ledger import HOT, REAP
from shared.registry.loader import ScriptSpec
from shared.registry.replicas import Replicas
from shared.registry.results import Fence, Written
from tests.lua.exercise import move, replica
from tests.lua.ledger_model import NUMBERS, Known, LedgerModel, cost_of

PROXIES = ("p1", "p2", "p3")
RIDS = ("r0", "r1", "r2", "r3", "r4")
DUMP = """
redis.call('HDEL', KEYS[1], '')
local reply = {redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[2]),
  redis.call('ZRANGE', KEYS[3], '0', '-1', 'WITHSCORES'), redis.call('ZRANGE', KEYS[4], '0', '-1')}
for index = 5, #KEYS do reply[#reply + 1] = redis.call('HGETALL', KEYS[index]) end
return reply
"""


def numbers(flat: list[bytes]) -> dict[str, int]:
    """Read name, number, name, number.. exactly."""
    return {flat[n].decode(): int(flat[n + 1]) for n in range(0, len(flat), 2)}


class Interleaving:
    """One seeded run."""

    def __init__(self, registry: Registry, fence: Fence, model: str, seed: int) -> None:
        self.registry = registry
        self.fence = fence
        self.name = model
        self.keys = registry.keys.model(model)
        self.random = random.Random(seed)
        self.model = LedgerModel()
        self.batches: list[tuple[str, list[list[str]]]] = []
        self.count = 0

    async def run(self, steps: int) -> None:
        """Take `steps` random steps, checking everything after each."""
        for _ in range(3):
            await self.toggle()
        acts = [self.batch] * 10 + [self.repeat] * 3 + [self.reap] * 2
        acts += [self.toggle, self.reweigh, self.limits, self.garbage]
        for _ in range(steps):
            await self.random.choice(acts)()
            await self.check()
        for proxy in PROXIES:
            self.count += 1
            await self.execute(proxy, [["R", request] for request in self.requests(proxy)])
            await self.check()
        assert not self.model.requests()

    def requests(self, proxy: str) -> list[str]:
        """Name what a proxy holds, at most a batch."""
        return sorted(self.model.leases.get(proxy, {}))[:64]

    async def evaluate(self, script: ScriptSpec, proxy: str, args: list[str]) -> list[Any]:
        """Run a script with raw arguments."""
        keys = self.keys.pick(script.keys, proxy)
        return await self.registry.connection.evalsha(script, keys, args)

    async def batch(self) -> None:
        """Let a proxy send some operations, sensible and hostile ones."""
        ops = [self.operation() for _ in range(self.random.choice((1, 1, 2, 3, 5, 8)))]
        proxy = self.random.choice(PROXIES)
        self.batches.append((proxy, ops))
        await self.execute(proxy, ops)

    async def repeat(self) -> None:
        """Run an earlier batch again: a retry, or a late execution."""
        if self.batches:
            await self.execute(*self.random.choice(self.batches[-12:]))

    def operation(self) -> list[str]:
        """Make one operation as raw arguments."""
        pick = self.random
        request = f"q{pick.randrange(14)}"
        cost = self.cost()
        verb = pick.choice("AAAARRD")
        if verb == "R":
            return ["R", request]
        if verb == "D":
            return ["D", request, pick.choice((*RIDS, "ghost")), cost]
        affinity = pick.sample((*RIDS, "ghost"), pick.choice((0, 0, 1, 3)))
        pairs = [part for rid in affinity for part in (rid, self.cost())]
        exclude = pick.sample((*RIDS, "ghost"), pick.choice((0, 0, 1, 2, 6)))
        tie = pick.choice((*NUMBERS, *(str(pick.randrange(1000)) for _ in range(30))))
        sizes = [str(len(affinity)), str(len(exclude))]
        return ["A", request, cost, tie, *sizes, *pairs, *exclude]

    def cost(self) -> str:
        """Make a cost, now and then a hostile one."""
        pick = self.random
        return pick.choice((*NUMBERS, *(str(pick.randrange(2000)) for _ in range(30))))

    async def execute(self, proxy: str, ops: list[list[str]]) -> None:
        """Run a batch and let the model follow and check each result."""
        self.count += 1
        reply = await self.evaluate(HOT, proxy, [proxy, *(part for op in ops for part in op)])
        assert len(reply) == len(ops) + 1
        for op, result in zip(ops, reply[1:], strict=True):
            if op[0] == "A":
                middle = 6 + 2 * int(op[4])
                pairs, exclude = op[6:middle], tuple(op[middle:])
                affinity = dict(zip(pairs[::2], map(cost_of, pairs[1::2]), strict=True))
                answer = result.decode()
                self.model.reserve(proxy, op[1], cost_of(op[2]), affinity, exclude, answer)
            elif op[0] == "R":
                assert result == self.model.release(proxy, op[1]), op
            else:
                assert result == self.model.adopt(proxy, op[1], op[2], cost_of(op[3])), op

    async def reap(self) -> None:
        """Let a peer reap a proxy, which beats or is long dead."""
        proxy = self.random.choice(PROXIES)
        limit = self.random.choice((1, 2, 3, 100))
        known = await self.registry.connection.command("ZSCORE", self.keys.px, proxy)
        dead = self.random.random() < 0.5
        if dead:
            await self.registry.connection.command("ZADD", self.keys.px, 1, proxy)
        reply = await self.evaluate(REAP, proxy, [proxy, "5000", str(limit)])
        if known is not None and not dead:
            assert reply == [b"ALIVE"]
            return
        left = await self.registry.ledger.leases(self.name, proxy)
        assert reply[0] == b"OK"
        assert reply[2] == len(left)
        self.model.reap(proxy, set(left), reply[1], limit)
        listed = await self.registry.connection.command("ZSCORE", self.keys.px, proxy)
        assert (listed is None) == (not left)
        if left:
            await self.registry.ledger.beat(self.name, proxy)

    async def toggle(self) -> None:
        """Let a replica appear, leave READY, or come back."""
        rid = self.random.choice(RIDS)
        known = self.model.replicas.get(rid)
        replicas: Replicas = self.registry.replicas
        if known is None:
            record = replica(rid, model=self.name, max_requests=self.random.choice((1, 3, 256)))
            assert isinstance(await replicas.create(self.fence, record), Written)
            steps = (ReplicaState.PENDING, ReplicaState.STARTING, ReplicaState.READY)
            for before, after in itertools.pairwise(steps):
                assert isinstance(
                    await move(self.registry, rid, before, after, model=self.name), Written
                )
            self.model.replicas[rid] = Known(cap=record.max_requests)
            return
        states = (ReplicaState.READY, ReplicaState.UNHEALTHY)
        before, after = states if known.ready else states[::-1]
        assert isinstance(await move(self.registry, rid, before, after, model=self.name), Written)
        known.ready = not known.ready

    async def reweigh(self) -> None:
        """Change throughput, cap and penalty of a replica."""
        rid = self.random.choice(RIDS)
        known = self.model.replicas.get(rid)
        if known is None:
            return
        capacity, known.inverse = self.random.choice(
            (
                (1.0, 1000),
                (2.0, 500),
                (3.0, 333),
                (0.5, 2000),
                (0.0, 1000),
                (-1.0, 1000),
                (1e-9, 1_000_000),
                (1e12, 1),
            )
        )
        penalty, known.penalty = self.random.choice(
            ((0, 0), (7, 7), (-9, 0), (10**15, 10**12), (1_000_000, 1_000_000))
        )
        cap = self.random.choice((0, 1, 2, 5, 256))
        known.cap = cap
        patch = {"capacity": capacity, "penalty": penalty, "max_requests": cap}
        outcome = await self.registry.replicas.patch(
            rid, self.name, gen=7, patch=patch, fence=self.fence
        )
        assert isinstance(outcome, Written)

    async def limits(self) -> None:
        """Change the model's own limits."""
        model, pick = self.model, self.random
        model.max_requests = pick.choice((0, 3, 10, 100_000, 100_000, 100_000))
        model.affinity_absolute = pick.choice((0, 0, 500, 10**6))
        model.affinity_relative = pick.choice((1.0, 1.5, 4.0, 1000.0))
        fields = {
            "max_requests": str(model.max_requests),
            "affinity_absolute": str(model.affinity_absolute),
            "affinity_relative": str(model.affinity_relative),
        }
        assert isinstance(await self.registry.specs.write(self.fence, self.name, fields), int)

    async def garbage(self) -> None:
        """Put nonsense into the lease hash of a proxy: it counts for nothing."""
        proxy = self.random.choice(PROXIES)
        key = self.keys.lease(proxy)
        value = self.random.choice(("", "r1", "r1 -5", "r1 nan", "r1 5 5", "\x00\xff"))
        await self.registry.connection.command("HSET", key, "foreign", value)
        reply = await self.evaluate(HOT, proxy, [proxy, "R", "foreign"])
        assert reply[1] == 1

    async def check(self) -> None:
        """Compare all that Redis holds with the model."""
        leases = [self.keys.lease(proxy) for proxy in PROXIES]
        keys = (self.keys.cost, self.keys.nreq, self.keys.ready, self.keys.px, *leases)
        dump = await self.registry.connection.command("EVAL", DUMP, len(keys), *keys)
        costs, requests, scores = (numbers(flat) for flat in dump[:3])
        for proxy, flat in zip(PROXIES, dump[4:], strict=True):
            assert not flat or proxy.encode() in dump[3], f"{proxy} holds, and is not in px"
            stored = {flat[n].decode(): flat[n + 1].decode() for n in range(0, len(flat), 2)}
            held = self.model.leases.get(proxy, {})
            assert stored == {request: f"{rid} {cost}" for request, (rid, cost) in held.items()}
        wanted = self.model.requests()
        total = requests.pop("*", 0)
        assert total == sum(wanted.values())
        assert requests == wanted
        assert costs == self.model.costs()
        assert scores == self.model.scores()
