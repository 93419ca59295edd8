"""The simulated fleet: replicas that compute in virtual time, and the ledger that runs real Lua.

A replica is the engine simulator's own scheduler (`services.simengine.scheduler`): continuous
batching under a token budget, chunked prefill, a KV cache of finite size with prefixes shared,
preemption. Its step costs are those of an 8-billion-parameter model on one large GPU, divided by
the replica's speed. The ledger is the registry's `Ledger` with the scripts as assembled for Redis.
"""

import heapq
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Protocol

from services.simengine.scheduler import Limits, Scheduler, StepCost
from services.simengine.scheduler import Sequence as Run
from shared.registry.keys import Keys
from shared.registry.ledger import HOT, Ledger, Op
from shared.registry.loader import ScriptLibrary, ScriptSpec
from shared.registry.wire import Argument, OnReply
from tests.routing.traces import BLOCK_TOKENS, Arrival
from tests.simulation.luahost import LuaHost
from tests.simulation.store import Store

MODEL: Final = "m"
LIMITS: Final = Limits(
    max_model_len=1 << 18,
    max_num_seqs=256,
    max_num_batched_tokens=8192,
    kv_tokens=448 * 1024,
    block_tokens=BLOCK_TOKENS,
    prefix_caching=True,
    max_queued_requests=None,
    max_queued_tokens=None,
)
STEP_MS: Final = 8.0
PREFILL_US_PER_TOKEN: Final = 30.0
DECODE_US_PER_SEQ: Final = 40.0


class Timeline:
    """Virtual time: what is due is done in order of time, then of planning."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = 0

    def at(self, when_s: float, act: Callable[[], None]) -> None:
        """Plan an act."""
        self._planned += 1
        heapq.heappush(self._due, (when_s, self._planned, act))

    def run(self) -> None:
        """Let time pass until nothing is planned."""
        due = self._due
        while due:
            self.now_s, _, act = heapq.heappop(due)
            act()


class Job:
    """One request and its life."""

    __slots__ = (
        "arrival", "ended_s", "first_s", "held_tokens", "number", "proxy", "rid", "run", "sent_s",
    )  # fmt: skip

    def __init__(self, number: int, arrival: Arrival, proxy: int, sent_s: float) -> None:
        self.number = number
        self.arrival = arrival
        self.proxy = proxy
        self.sent_s = sent_s
        self.rid = ""
        self.first_s = 0.0
        self.ended_s = 0.0
        self.held_tokens = 0
        self.run: Run | None = None


class Audience(Protocol):
    """Who hears of a request's progress."""

    def first(self, job: Job) -> None:
        """Hear that its first token has come."""

    def ended(self, job: Job) -> None:
        """Hear that it has ended."""


class Replica:
    """One engine."""

    def __init__(
        self,
        rid: str,
        speed: float,
        timeline: Timeline,
        audience: Audience,
    ) -> None:
        self.rid = rid
        self.speed = speed
        self._timeline = timeline
        self._audience = audience
        self._jobs: dict[Run, Job] = {}
        self._stepping = False
        self.backlog_tokens = 0
        """Prompt tokens that wait or are being computed, as far as the engine must compute them."""
        self.worked_s = 0.0
        self.scheduler = Scheduler(
            LIMITS,
            StepCost(
                step_ms=STEP_MS / speed,
                prefill_us_per_token=PREFILL_US_PER_TOKEN / speed,
                decode_us_per_seq=DECODE_US_PER_SEQ / speed,
            ),
        )

    def send(self, job: Job) -> None:
        """Take a request."""
        arrival = job.arrival
        ids: list[int] = []
        for block in arrival.blocks:
            ids += (block,) * BLOCK_TOKENS
        del ids[arrival.input_tokens :]
        job.run = run = Run(ids, arrived_s=self._timeline.now_s)
        self._jobs[run] = job
        self.backlog_tokens += arrival.input_tokens
        self.scheduler.add(run)
        if not self._stepping:
            self._step()

    def _step(self) -> None:
        step = self.scheduler.plan(self._timeline.now_s)
        self._stepping = step is not None
        if step is not None:
            self.worked_s += step.duration_s
            done_s = self._timeline.now_s + step.duration_s
            self._timeline.at(done_s, lambda: self._stepped(step))

    def _stepped(self, step: Any) -> None:  # noqa: ANN401 - the scheduler's own
        now_s = self._timeline.now_s
        for run in self.scheduler.complete(step):
            job = self._jobs[run]
            self.scheduler.append(run, 0)
            made = len(run.ids) - run.prompt_tokens
            if made == 1:
                job.first_s = now_s
                job.held_tokens = run.cached_tokens
                self.backlog_tokens -= job.arrival.input_tokens
                self._audience.first(job)
            if made >= job.arrival.output_tokens:
                job.ended_s = now_s
                self.scheduler.remove(run)
                del self._jobs[run]
                job.run = None
                self._audience.ended(job)
        self._step()


class RealLedger:
    """The registry's ledger over the assembled scripts, without a wait anywhere."""

    def __init__(self, host: LuaHost, weights: dict[str, str], fields: dict[str, str]) -> None:
        self._host = host
        self._store = Store()
        keys = Keys("sim")
        self._ledger = Ledger(self, keys)
        model = keys.model(MODEL)
        for rid, weight in weights.items():
            self._store.call("ZADD", model.ready, "0", rid)
            self._store.call("HSET", model.weight, rid, weight)
        for field, value in fields.items():
            self._store.call("HSET", model.spec, field, value)

    async def evalsha(
        self, script: ScriptSpec, keys: Sequence[str | bytes], args: Sequence[Argument]
    ) -> Any:  # noqa: ANN401 - any reply
        """Run a script at once."""
        parts = [part.decode() if isinstance(part, bytes) else str(part) for part in (*keys, *args)]
        sha = self._host.library[script.name].sha
        return self._host.run(sha, self._store, len(keys), parts)

    def call(
        self,
        script: ScriptSpec,
        keys: tuple[str, ...],
        args: Sequence[Argument],
        on_reply: OnReply,
    ) -> None:
        """Run a script at once, and hand its reply on."""
        on_reply(_result(self.evalsha(script, keys, args)))

    def batch(self, proxy: str, ops: Sequence[Op]) -> list[str | bool]:
        """Apply a batch."""
        return _result(self._ledger.batch(MODEL, proxy, ops)).results


def _result(coroutine: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401 - whatever it returns
    """Run a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("the ledger waited for something: the simulation has no event loop")


def host() -> LuaHost:
    """Compile the scripts as they are in the tree."""
    library = ScriptLibrary.load()
    assert HOT.name in library.names
    return LuaHost(library)
