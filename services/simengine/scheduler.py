"""Who computes what in the next step, and how long that step takes. Pure: time is an argument.

Continuous batching as vLLM does it: running sequences first, in order of arrival, then waiting
ones while the step's token budget, the sequence limit and the KV cache have room; a long prompt
is computed in chunks; when the cache is full the latest running sequence is preempted and
recomputed later. A sequence with room for itself alone always finishes, because the KV capacity
is at least the longest context (checked at start).
"""

from collections import deque
from enum import Enum

import msgspec

from services.simengine.kv import BlockPool


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine can hold."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_tokens: int
    block_tokens: int
    prefix_caching: bool
    max_queued_requests: int | None
    max_queued_tokens: int | None


class StepCost(msgspec.Struct, frozen=True, kw_only=True):
    """How long a step takes: base + per prompt token computed + per sequence that decodes."""

    step_ms: float
    prefill_us_per_token: float
    decode_us_per_seq: float

    def seconds(self, prefill_tokens: int, decoding: int) -> float:
        """Return the duration of one step, in seconds."""
        return (
            self.step_ms * 1e-3
            + prefill_tokens * self.prefill_us_per_token * 1e-6
            + decoding * self.decode_us_per_seq * 1e-6
        )


class Rejection(Enum):
    """Which queue limit refused a request; the value is the metric's label."""

    REQUESTS = "max_num_queued_reqs"
    TOKENS = "max_num_queued_tokens"


class SequenceState(Enum):
    """Where a sequence is; GONE is finished or aborted, and holds nothing."""

    WAITING = "waiting"
    RUNNING = "running"
    GONE = "gone"


class Sequence:
    """One prompt and its run, as far as scheduling is concerned.

    `ids` grows by the caller's hand (`Scheduler.append`). `computed` is how many of them are in
    the KV cache.
    """

    __slots__ = (
        "arrived_s",
        "block_keys",
        "cached_tokens",
        "capacity",
        "computed",
        "ids",
        "private_blocks",
        "prompt_tokens",
        "salt",
        "scheduled_s",
        "state",
    )

    def __init__(self, prompt_ids: list[int], *, arrived_s: float, salt: str = "") -> None:
        self.ids = list(prompt_ids)
        self.prompt_tokens = len(prompt_ids)
        self.arrived_s = arrived_s
        self.scheduled_s: float | None = None
        self.salt = hash(salt)
        self.state = SequenceState.WAITING
        self.computed = 0
        self.cached_tokens = 0
        self.capacity = 0
        self.private_blocks = 0
        self.block_keys: list[int] = []


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One planned step: each sequence with the number of tokens it computes."""

    work: list[tuple[Sequence, int]]
    prefill_tokens: int
    duration_s: float


class Scheduler:
    """The state of one engine. Call `plan`, wait `duration_s`, call `complete`."""

    def __init__(self, limits: Limits, cost: StepCost) -> None:
        self.limits = limits
        self._cost = cost
        self.pool = BlockPool(
            limits.kv_tokens // limits.block_tokens, caching=limits.prefix_caching
        )
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self.prefix_queried_tokens = 0
        self.prefix_hit_tokens = 0
        self._prefilling_tokens = 0

    @property
    def running(self) -> int:
        """How many sequences compute."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many sequences wait for room."""
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use, 0 to 1."""
        return self.pool.used_blocks / self.pool.capacity_blocks

    def rejection(self, prompt_tokens: int, *, sequences: int = 1) -> Rejection | None:
        """Say which limit refuses a request now; None admits it.

        The request limit counts running and waiting alike. The token limit bounds prompt tokens
        that are not computed yet; one larger prompt is admitted when nothing else prefills.
        """
        limit = self.limits.max_queued_requests
        if limit is not None and self.running + self.waiting + sequences > limit:
            return Rejection.REQUESTS
        limit = self.limits.max_queued_tokens
        if (
            limit is not None
            and self._prefilling_tokens
            and self._prefilling_tokens + prompt_tokens > limit
        ):
            return Rejection.TOKENS
        return None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, first come first served."""
        self._waiting.append(sequence)
        self._prefilling_tokens += sequence.prompt_tokens

    def plan(self, now_s: float) -> Step | None:
        """Decide the next step; None when there is nothing to compute."""
        if not self._running and not self._waiting:
            return None
        budget = self.limits.max_num_batched_tokens
        work: list[tuple[Sequence, int]] = []
        prefill_tokens, budget, preempted = self._plan_running(work, budget)
        if not preempted:
            prefill_tokens += self._plan_waiting(work, budget, now_s)
        decoding = sum(1 for sequence, _ in work if len(sequence.ids) > sequence.prompt_tokens)
        return Step(
            work=work,
            prefill_tokens=prefill_tokens,
            duration_s=self._cost.seconds(prefill_tokens, decoding),
        )

    def complete(self, step: Step) -> list[Sequence]:
        """Take in a step that has run; return the sequences that are due a next token."""
        due: list[Sequence] = []
        block = self.limits.block_tokens
        for sequence, tokens in step.work:
            if sequence.state is not SequenceState.RUNNING:
                continue  # aborted while the step ran
            sequence.computed += tokens
            if (len(sequence.block_keys) + 1) * block <= sequence.computed:
                self._seal(sequence)
            if sequence.computed == len(sequence.ids):
                due.append(sequence)
        return due

    def append(self, sequence: Sequence, token_id: int) -> None:
        """Record the token that a due sequence produced."""
        if len(sequence.ids) == sequence.prompt_tokens:
            self._prefilling_tokens -= sequence.prompt_tokens
        sequence.ids.append(token_id)

    def remove(self, sequence: Sequence) -> None:
        """Take out a finished or aborted sequence; a second call changes nothing."""
        if sequence.state is SequenceState.GONE:
            return
        if sequence.state is SequenceState.RUNNING:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        if len(sequence.ids) == sequence.prompt_tokens:
            self._prefilling_tokens -= sequence.prompt_tokens
        self._free(sequence)
        sequence.state = SequenceState.GONE

    def _plan_running(self, work: list[tuple[Sequence, int]], budget: int) -> tuple[int, int, bool]:
        running = self._running
        prefill_tokens = 0
        preempted = False
        at = 0
        while at < len(running) and budget:
            sequence = running[at]
            want = len(sequence.ids) - sequence.computed
            want = min(want, budget)
            while sequence.computed + want > sequence.capacity and not self._grow(sequence, want):
                self._preempt(running[-1])
                preempted = True
                if at >= len(running):
                    return prefill_tokens, budget, True
            work.append((sequence, want))
            budget -= want
            if sequence.computed < sequence.prompt_tokens:
                prefill_tokens += want
            at += 1
        return prefill_tokens, budget, preempted

    def _plan_waiting(self, work: list[tuple[Sequence, int]], budget: int, now_s: float) -> int:
        prefill_tokens = 0
        block = self.limits.block_tokens
        while self._waiting and budget and len(self._running) < self.limits.max_num_seqs:
            sequence = self._waiting[0]
            # The last token is always computed: its output is what comes next.
            keys = self._content_keys(sequence, (len(sequence.ids) - 1) // block)
            shared = self.pool.share_prefix(keys)
            sequence.block_keys = keys[:shared]
            sequence.computed = sequence.capacity = shared * block
            want = min(len(sequence.ids) - sequence.computed, budget)
            if not self._grow(sequence, want):
                self._free(sequence)
                break
            self._waiting.popleft()
            self._running.append(sequence)
            sequence.state = SequenceState.RUNNING
            if sequence.scheduled_s is None:
                sequence.scheduled_s = now_s
                sequence.cached_tokens = sequence.computed
                self.prefix_queried_tokens += sequence.prompt_tokens
                self.prefix_hit_tokens += sequence.computed
            work.append((sequence, want))
            budget -= want
            prefill_tokens += want
        return prefill_tokens

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        block = self.limits.block_tokens
        missing = -(-(sequence.computed + tokens - sequence.capacity) // block)
        if missing > 0:
            if not self.pool.take(missing):
                return False
            sequence.private_blocks += missing
            sequence.capacity += missing * block
        return True

    def _seal(self, sequence: Sequence) -> None:
        full = sequence.computed // self.limits.block_tokens
        for key in self._content_keys(sequence, full, first=len(sequence.block_keys)):
            if not self.pool.seal(key):
                return
            sequence.block_keys.append(key)
            sequence.private_blocks -= 1

    def _content_keys(self, sequence: Sequence, blocks: int, *, first: int = 0) -> list[int]:
        """Return the keys of the full blocks `first` to `blocks`, each covering all before it."""
        if not self.limits.prefix_caching:
            return []
        size = self.limits.block_tokens
        key = sequence.block_keys[first - 1] if first else sequence.salt
        keys: list[int] = []
        for at in range(first, blocks):
            key = hash((key, *sequence.ids[at * size : (at + 1) * size]))
            keys.append(key)
        return keys

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._free(sequence)
        sequence.state = SequenceState.WAITING
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_keys, sequence.private_blocks)
        sequence.block_keys = []
        sequence.private_blocks = sequence.computed = sequence.capacity = 0
