"""A stage for takeovers: real scripts on a real Redis, real agents' rules, and virtual time.

Its leaders can be stopped before any single write and let loose again later. Time is a key in
Redis: the scripts are the real ones, except that `TIME` reads it. A gate stands before every write
of a leader, so that a test decides which of them arrives when.
"""

import asyncio
import contextlib
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec
import redis.asyncio

from services.controller.act import Actor
from services.controller.actions import Action, Report
from services.controller.events import EventLog
from services.controller.leader import Reign
from services.controller.metrics import Metrics
from services.controller.term import Term
from shared.clock import ManualClock
from shared.errors import LeadershipLostError
from shared.models.deployment import EngineKind
from shared.models.host import Host
from shared.models.replica import Replica
from shared.models.routing import ModelSpec
from shared.registry import Registry
from shared.registry.connection import Argument, Connection
from shared.registry.keys import Keys
from shared.registry.leadership import Leading
from shared.registry.loader import Script, ScriptLibrary, ScriptSpec
from shared.registry.results import Fence
from tests.unit.controller.hosts import SimHost

LEASE_S: Final = 5.0
SETTLE_S: Final = 3.0
_FOREVER_MS: Final = 3_600_000
_READS: Final = frozenset(
    {"hash/read", "zset/read", "fleet/members", "replica/snapshot", "replica/pulse", "leader/lead"}
)

# The test's own looks at everything at once; no script of redmesh names keys by a pattern.
_DUMP: Final = """
local found = {}
for _, key in ipairs(redis.call('KEYS', ARGV[1])) do
  found[#found + 1] = key
  found[#found + 1] = redis.call('DUMP', key)
end
return found
"""
_LOAD: Final = """
for _, key in ipairs(redis.call('KEYS', ARGV[1])) do
  redis.call('DEL', key)
end
for index = 2, #ARGV, 2 do
  redis.call('RESTORE', ARGV[index], 0, ARGV[index + 1])
end
"""
_DIGEST: Final = """
local found, keys = {}, redis.call('KEYS', ARGV[1])
table.sort(keys)
for _, key in ipairs(keys) do
  local kind = redis.call('TYPE', key).ok
  found[#found + 1] = key
  if kind == 'hash' then
    local fields = redis.call('HKEYS', key)
    table.sort(fields)
    for _, field in ipairs(fields) do
      found[#found + 1] = field
      found[#found + 1] = redis.call('HGET', key, field)
    end
  elseif kind == 'zset' then
    found[#found + 1] = table.concat(redis.call('ZRANGE', key, 0, -1, 'WITHSCORES'), ' ')
  elseif kind == 'stream' then
    found[#found + 1] = tostring(redis.call('XLEN', key))
  else
    found[#found + 1] = redis.call('GET', key)
  end
end
return redis.sha1hex(table.concat(found, string.char(0)))
"""

Hook = Callable[[str], Awaitable[None]]


class StageConnection(Connection):
    """Tells virtual time, and asks a hook before each write."""

    def __init__(
        self, client: "redis.asyncio.Redis", scripts: ScriptLibrary, now_ms: Callable[[], int]
    ) -> None:
        super().__init__(client, scripts, shown_url="the stage")
        self.hook: Hook | None = None
        self._now_ms = now_ms

    async def evalsha(
        self, script: ScriptSpec, keys: Sequence[str | bytes], args: Sequence[Argument]
    ) -> Any:  # noqa: ANN401 - a reply is whatever the script returns
        """Run `script`; a write asks first."""
        if self.hook is not None and script.name not in _READS:
            await self.hook(script.name)
        return await super().evalsha(script, keys, args)

    async def command(self, *parts: Argument) -> Any:  # noqa: ANN401 - a reply is what Redis says
        """Run one command; TIME is the stage's own."""
        if parts[0] == "TIME":
            now_ms = self._now_ms()
            return [str(now_ms // 1000), str(now_ms % 1000 * 1000)]
        if self.hook is not None:
            await self.hook(str(parts[0]))
        return await super().command(*parts)


class Engines:
    """Answers the leader's probes: an engine answers if it runs."""

    def __init__(self, hosts: Iterable[SimHost]) -> None:
        self._hosts = hosts

    async def answers(self, replica: Replica) -> bool:
        """Tell whether the engine of `replica` runs."""
        return any(replica.rid in host.engines for host in self._hosts)


class Stage:
    """The fleet on stage: stored state, hosts and time."""

    def __init__(self, client: "redis.asyncio.Redis", prefix: str, hosts: Iterable[Host]) -> None:
        self.clock = ManualClock()
        self.keys = Keys(prefix)
        self._client = client
        self._time_key = f"{prefix}-now"
        self._scripts = _at_virtual_time(self._time_key)
        self.registry = Registry.over(self.connection(), self.keys)
        self.hosts = {host.host: SimHost(self.registry, host) for host in hosts}
        self.prober = Engines(self.hosts.values())
        self._minted = 0

    def connection(self) -> StageConnection:
        """Open another way to the same Redis."""
        return StageConnection(self._client, self._scripts, self.clock.now_ms)

    def mint(self, model: str) -> str:
        """Name replicas in the order in which they are made."""
        self._minted += 1
        return f"{model}-{self._minted:04}"

    async def pass_time(self, seconds: float = 1.0) -> int:
        """Let time pass, then let every agent look; tells how much they did."""
        self.clock.advance(seconds)
        await self._set_time()
        now_s = self.clock.monotonic_s()
        return sum([await host.look(now_s) for host in self.hosts.values()])

    async def expire_lease(self) -> None:
        """Let the lease of whoever leads end; agents go on meanwhile."""
        for _ in range(int(LEASE_S)):
            await self.pass_time()
        await self._command("DEL", self.keys.fleet.leader)

    async def digest(self) -> str:
        """Give a digest of all that is stored, whatever order Redis keeps it in."""
        return str(await self._all(_DIGEST))

    async def save(self) -> "Saved":
        """Take a copy of everything."""
        return Saved(
            stored=tuple(await self._all(_DUMP)),
            engines={
                name: (host.alive, dict(host.engines), dict(host.launched))
                for name, host in self.hosts.items()
            },
            minted=self._minted,
            now_ms=self.clock.now_ms(),
        )

    async def load(self, saved: "Saved") -> None:
        """Go back to a copy."""
        await self._all(_LOAD, *saved.stored)
        await self._command("DEL", self.keys.fleet.leader)
        for name, (alive, engines, launched) in saved.engines.items():
            host = self.hosts[name]
            host.alive, host.engines, host.launched = alive, dict(engines), dict(launched)
        self._minted = saved.minted
        self.clock.advance((saved.now_ms - self.clock.now_ms()) / 1000)
        await self._set_time()

    async def outcome(self) -> "Outcome":
        """Read what an operator would call the state of the fleet, without names and times."""
        fleet = self.registry.fleet
        deployments = await fleet.deployments()
        orders = {name: await fleet.orders(name) for name in self.hosts}
        replicas: Counter[tuple[str, ...]] = Counter()
        specs: dict[str, ModelSpec] = {}
        for model in deployments:
            snapshot = await self.registry.replicas.snapshot(model)
            specs[model] = msgspec.structs.replace(snapshot.spec, epoch=None, created_ms=0)
            for record in snapshot.replicas.values():
                order = orders[record.host].get(record.rid)
                action = "none" if order is None or order.gen != record.gen else order.action.value
                url = record.url if record.kind is EngineKind.EXTERNAL else ""
                fields = (model, record.revision, record.state.value, url)
                replicas[*fields, str(record.max_requests), action] += 1
        running = [order for host in self.hosts.values() for order in host.running()]
        return Outcome(
            deployments={model: d.deleted for model, d in deployments.items()},
            specs=specs,
            replicas=dict(replicas),
            orders=sum(len(each) for each in orders.values()),
            engines=dict(Counter((o.model, o.revision, o.spec.revision()) for o in running)),
            hosts=tuple(sorted(await fleet.hosts())),
            members=tuple(sorted(await fleet.members())),
            holds=tuple(sorted(await fleet.holds())),
        )

    async def clear(self) -> None:
        """Leave nothing in Redis."""
        await self.load(Saved(stored=(), engines={}, minted=0, now_ms=self.clock.now_ms()))
        await self._command("DEL", self._time_key)

    async def _set_time(self) -> None:
        await self._command("SET", self._time_key, str(self.clock.now_ms()))

    async def _all(self, script: str, *args: bytes) -> Any:  # noqa: ANN401 - any reply
        return await self._command("EVAL", script, 0, f"{self.keys.prefix}:*", *args)

    async def _command(self, *parts: Argument) -> Any:  # noqa: ANN401 - any reply
        return await self.registry.connection.command(*parts)


class Saved(msgspec.Struct, frozen=True):
    """A copy of everything on a stage."""

    stored: tuple[bytes, ...]
    """Key, dump, key, dump .."""
    engines: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]]
    minted: int
    now_ms: int


class Outcome(msgspec.Struct, frozen=True):
    """The state of a fleet as far as it must not depend on who led when."""

    deployments: dict[str, bool]
    specs: dict[str, ModelSpec]
    replicas: dict[tuple[str, ...], int]
    """Model, revision, state, URL if external, request cap and order → how many."""
    orders: int
    engines: dict[tuple[str, str, str], int]
    """Model, revision by name, revision by content → processes that run."""
    hosts: tuple[str, ...]
    members: tuple[str, ...]
    holds: tuple[str, ...]


class Seat:
    """One controller on stage. Its own clock may stand still: it always believes that it leads."""

    def __init__(self, stage: Stage, owner: str) -> None:
        self.owner = owner
        self.writes: list[str] = []
        """Every write it has sent, or was stopped from sending."""
        self.freeze_at = -1
        """Index of the write before which it freezes; -1 for never."""
        self.before_write: Callable[[], Awaitable[None]] | None = None
        self.frozen: asyncio.Task[None] | None = None
        self._stage = stage
        self._connection = stage.connection()
        self._connection.hook = self._gate
        self._registry = Registry.over(self._connection, stage.keys)
        self._thawed = asyncio.Event()
        self._reached = asyncio.Event()
        self._left: list[Action] = []
        self._term: Term | None = None
        self._since_s = 0.0

    async def elect(self) -> None:
        """Take the lease, and begin a term."""
        reply = await self._registry.leadership.try_lead(self.owner, _FOREVER_MS)
        assert isinstance(reply, Leading), reply
        stage, fence = self._stage, Fence(reply.epoch, self.owner)
        self._since_s = stage.clock.monotonic_s()
        events = EventLog(self._registry.fleet, stage.clock, f"controller/{self.owner}")
        metrics = Metrics()
        actor = Actor(self._registry, events, fence, lambda: True, metrics.count_action, stage.mint)
        reign = Reign(epoch=reply.epoch, since_s=self._since_s)
        self._term = Term(reign, self._registry, stage.prober, stage.clock, metrics, actor)

    @property
    def term(self) -> Term:
        """The term, once elected."""
        assert self._term is not None
        return self._term

    async def begin(self) -> bool:
        """Shut out earlier leaders; false if it froze over that."""
        return await self._unless_frozen(self.term.begin(self.owner))

    async def step(self) -> int | None:
        """Read, plan and act; gives how much was planned, None if it froze over that."""
        planned = 0

        async def work() -> None:
            nonlocal planned
            settled = self._stage.clock.monotonic_s() - self._since_s >= SETTLE_S
            actions = await self.term.decide(settled=settled)
            planned = sum(not isinstance(action, Report) for action in actions)
            if self.before_write is not None:
                await self.before_write()
            await self.term.actor.carry_out(self._noting(actions))

        return planned if await self._unless_frozen(work()) else None

    async def write_late(self) -> None:
        """Send everything that is left of an interrupted plan; each must be refused."""
        actor = self.term.actor
        before = await self._stage.digest()
        for action in self._left:
            try:
                await actor.carry_out([action])
            except LeadershipLostError:
                continue
            assert isinstance(action, Report), f"a late {action} was not refused"
        for model in await self._registry.fleet.deployments():
            with contextlib.suppress(LeadershipLostError):
                await actor.raise_fences([model])
                raise AssertionError(f"a late fence on {model} was not refused")
        assert await self._stage.digest() == before, f"late writes changed something: {self._left}"

    async def thaw(self) -> bool:
        """Let the frozen write go; tells whether it was refused and changed nothing."""
        task = self.frozen
        assert task is not None
        self.frozen = None
        self.freeze_at = -1
        before = await self._stage.digest()
        self._thawed.set()
        try:
            await task
        except LeadershipLostError:
            return await self._stage.digest() == before
        return False

    async def _gate(self, name: str) -> None:
        number = len(self.writes)
        self.writes.append(name)
        if number == self.freeze_at:
            self._reached.set()
            await self._thawed.wait()
        elif self.before_write is not None:
            await self.before_write()

    async def _unless_frozen(self, work: Awaitable[None]) -> bool:
        task = asyncio.ensure_future(work)
        reached = asyncio.ensure_future(self._reached.wait())
        await asyncio.wait({task, reached}, return_when=asyncio.FIRST_COMPLETED)
        reached.cancel()
        if task.done():
            task.result()
            return True
        self.frozen = task
        return False

    def _noting(self, actions: Sequence[Action]) -> Iterator[Action]:
        for number, action in enumerate(actions):
            self._left = list(actions[number:])
            yield action
        self._left = []


def _at_virtual_time(key: str) -> ScriptLibrary:
    """Assemble the scripts as they are, but let them read time from `key`."""
    library = ScriptLibrary.load()
    scripts: dict[str, Script] = {}
    for name in library.names:
        script = library[name]
        text = script.text.replace(
            "redis.call('TIME')", f"{{ '0', redis.call('GET', '{key}') .. '000' }}"
        )
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        scripts[name] = script._replace(text=text, sha=sha)
    return ScriptLibrary(scripts)
