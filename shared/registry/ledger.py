"""The reservation ledger: who holds what on which replica, kept true by atomic scripts.

A reservation is one request's lease on one replica, stored in a hash of its proxy; all totals and
scores are derived from leases. It lives as long as its proxy beats: there is no age limit. Every
act is idempotent by request id, so that a repeat after a lost reply changes nothing.

A batch may be awaited (`Ledger.batch`) or answered by callback (`Ledger.submit`); both write and
read it alike.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from shared.errors import RegistryError, RegistryUnavailableError
from shared.ids import is_name
from shared.models.routing import Beat, Lease
from shared.registry.connection import Evaluator
from shared.registry.keys import PROXY_PART, Keys
from shared.registry.loader import ScriptSpec
from shared.registry.results import pairs, text_of, whole_number
from shared.registry.wire import Argument

BUSY: Final = "!BUSY"
"""Every replica that was not excluded is at its cap, or the model is at its own."""
NONE: Final = "!NONE"
"""No replica is READY, or all that are were excluded."""
MAX_BATCH: Final = 64
MAX_CANDIDATES: Final = 16
"""Of one request: replicas that it would rather have, and replicas that it must not get."""
TIE_BITS: Final = 29
"""Of a random number for ties: the script takes what is above 1e9 for 1e9."""
SILENCE_MS: Final = 5000
GRACE_MS: Final = 2000
RECOUNT_TRIES: Final = 5

HOT: Final = ScriptSpec(
    "ledger/hot", "M", ("ready", "weight", "cost", "nreq", PROXY_PART, "px", "ver", "spec"), ()
)
BEAT: Final = ScriptSpec(
    "ledger/beat",
    "M",
    ("px", PROXY_PART, "wait", "ver", "suspect", "ready", "weight", "cost", "nreq"),
    ("OK",),
)
SUSPECTS: Final = ScriptSpec("ledger/suspects", "M", ("px", "suspect"), ("OK",))
REAP: Final = ScriptSpec(
    "ledger/reap",
    "M",
    ("ready", "weight", "cost", "nreq", PROXY_PART, "px", "wait", "suspect"),
    ("OK", "ALIVE"),
)
RECOUNT: Final = ScriptSpec(
    "ledger/recount", "M", ("ready", "weight", "cost", "nreq", "px"), ("OK", "CONFLICT")
)
BOOKS: Final = ScriptSpec("ledger/books", "M", ("ready", "weight", "cost", "nreq"), ("OK",))
READ: Final = ScriptSpec("hash/read", "*", ("*",), ("OK",))
SCORES: Final = ScriptSpec("zset/read", "*", ("*",), ("OK",))


class Reserve(NamedTuple):
    """Reserve capacity for a request; a request that has a reservation gets the same again."""

    request: str
    cost_tokens: int
    tiebreak: int
    """A random whole number: decides among replicas of equal score."""
    affinity: tuple[tuple[str, int], ...] = ()
    """Replicas that may hold a part of the prompt, each once, and the cost there in tokens; only
    the first `MAX_CANDIDATES` count."""
    exclude: tuple[str, ...] = ()
    """Replicas that this request has tried; only the last `MAX_CANDIDATES` count."""

    def cost_on(self, rid: str) -> int:
        """Return what the request costs on a replica, in tokens."""
        for candidate, cost_tokens in self.affinity:
            if candidate == rid:
                return cost_tokens
        return self.cost_tokens


class Release(NamedTuple):
    """Give back what a request holds."""

    request: str


class Adopt(NamedTuple):
    """State that a request is on a replica, at this cost: after a loss, or to settle the cost."""

    request: str
    rid: str
    cost_tokens: int


Op = Reserve | Release | Adopt
OnBatchReply = Callable[["BatchReply | RegistryError"], None]


class BatchReply(NamedTuple):
    """Routing version, and one result per operation.

    Reserve: the replica id, `BUSY` or `NONE`. Release and Adopt: whether anything changed.
    """

    ver: int
    results: list[str | bool]


class ReapReply(NamedTuple):
    """What a reap did: reservations dropped and left; `alive` means it has beaten after all."""

    dropped: int
    left: int
    alive: bool


class Totals(NamedTuple):
    """What is outstanding on one replica, or on the model (`*`)."""

    cost_tokens: int
    requests: int


class RecountReply(NamedTuple):
    """What a recount did: totals and scores that were wrong, and reservations that there are."""

    corrected: int
    requests: int


class Books(NamedTuple):
    """All accounts of a model at one moment."""

    leases: dict[str, dict[str, Lease]]
    """Proxy → request → reservation; proxies without reservations are left out."""
    requests: dict[str, int]
    """Replica → outstanding requests; `*` is the model's."""
    costs: dict[str, int]
    ready: dict[str, float]
    """Replica → score."""
    weights: dict[str, str]
    """Replica → "inverse-throughput cap penalty"."""


class Ledger:
    """The ledger of every model, seen through one client."""

    def __init__(self, client: Evaluator, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._hot_keys: dict[tuple[str, str], tuple[str, ...]] = {}

    async def batch(self, model: str, proxy: str, ops: Sequence[Op]) -> BatchReply:
        """Apply at most 64 operations of one proxy on one model, in order and at once."""
        args = _encoded(proxy, ops)
        return _decoded(await self._client.evalsha(HOT, self._named(model, proxy), args))

    def submit(self, model: str, proxy: str, ops: Sequence[Op], on_reply: OnBatchReply) -> None:
        """Do the same without waiting: `on_reply` gets the outcome or the error, once, later."""

        def replied(reply: Any) -> None:  # noqa: ANN401 - whatever the script returns
            on_reply(reply if isinstance(reply, RegistryError) else _decoded(reply))

        self._client.call(HOT, self._named(model, proxy), _encoded(proxy, ops), replied)

    async def beat(self, model: str, proxy: str, waiting: int = 0) -> Beat:
        """Say that `proxy` serves `model` and how many of its requests wait."""
        keys = self._keys.model(model).pick(BEAT.keys, proxy)
        reply = await self._client.evalsha(BEAT, keys, (proxy, waiting, SILENCE_MS))
        _, leases, ver, known, total, silent = reply
        return Beat(
            leases=leases,
            ver=whole_number(ver),
            known=known == 1,
            waiting_total=total,
            silent=silent,
        )

    async def suspects(
        self, model: str, silence_ms: int = SILENCE_MS, grace_ms: int = GRACE_MS
    ) -> list[str]:
        """Name the proxies to reap: silent, and marked as silent at least `grace_ms` ago."""
        keys = self._keys.model(model).pick(SUSPECTS.keys)
        reply = await self._client.evalsha(SUSPECTS, keys, (silence_ms, grace_ms))
        # A foreign member of `px` names no proxy: there is nothing to reap, and no key for it.
        return [name for name in map(text_of, reply[1:]) if is_name(name)]

    async def reap(
        self, model: str, proxy: str, silence_ms: int = SILENCE_MS, limit: int = 100
    ) -> ReapReply:
        """Drop up to `limit` reservations of a silent proxy; call again while some are left."""
        keys = self._keys.model(model).pick(REAP.keys, proxy)
        reply = await self._client.evalsha(REAP, keys, (proxy, silence_ms, limit))
        if reply[0] == b"ALIVE":
            return ReapReply(0, 0, alive=True)
        return ReapReply(reply[1], reply[2], alive=False)

    async def leases(self, model: str, proxy: str) -> dict[str, Lease]:
        """Read a proxy's reservations by request id; what does not parse is left out."""
        return _leases(await self._read(self._keys.model(model).lease(proxy)))

    async def recount(self, model: str, holders: Iterable[str] = ()) -> RecountReply:
        """Work out all totals and scores of a model from its reservations, at any time.

        `holders` are proxies that may hold some though they have no beat on record. Raises
        RegistryUnavailableError when proxies appear faster than they can be named.
        """
        keys = self._keys.model(model)
        for _ in range(RECOUNT_TRIES):
            names = sorted({*await self.proxies(model), *holders})
            named = (*keys.pick(RECOUNT.keys), *map(keys.lease, names))
            reply = await self._client.evalsha(RECOUNT, named, names)
            if reply[0] == b"OK":
                return RecountReply(reply[1], reply[2])
        raise RegistryUnavailableError(f"the proxies of {model} change too fast to be counted")

    async def books(self, model: str, holders: Iterable[str]) -> Books:
        """Read all accounts of a model at one moment, as far as `holders` hold reservations."""
        keys, names = self._keys.model(model), sorted(set(holders))
        named = (*keys.pick(BOOKS.keys), *map(keys.lease, names))
        _, ready, weights, costs, requests, *held = await self._client.evalsha(BOOKS, named, ())
        leases = {name: _leases(pairs(flat)) for name, flat in zip(names, held, strict=True)}
        return Books(
            leases={name: found for name, found in leases.items() if found},
            requests={text_of(rid): whole_number(n) for rid, n in pairs(requests).items()},
            costs={text_of(rid): whole_number(n) for rid, n in pairs(costs).items()},
            ready={text_of(rid): float(whole_number(n)) for rid, n in pairs(ready).items()},
            weights={text_of(rid): text_of(text) for rid, text in pairs(weights).items()},
        )

    async def proxies(self, model: str) -> dict[str, int]:
        """Read when each proxy of this model last beat, in Redis' milliseconds."""
        key = self._keys.model(model).px
        flat = await self._client.evalsha(SCORES, (key,), ())
        beats = {text_of(name): whole_number(ms) for name, ms in pairs(flat[1:]).items()}
        return {name: ms for name, ms in beats.items() if is_name(name)}

    async def totals(self, model: str) -> dict[str, Totals]:
        """Read what is outstanding per replica; `*` is the model's sum."""
        keys = self._keys.model(model)
        costs = await self._read(keys.cost)
        requests = await self._read(keys.nreq)
        totals = {
            text_of(rid): Totals(whole_number(costs.get(rid, 0)), whole_number(count))
            for rid, count in requests.items()
        }
        model_cost = sum(total.cost_tokens for rid, total in totals.items() if rid != "*")
        totals["*"] = Totals(model_cost, totals["*"].requests if "*" in totals else 0)
        return totals

    def _named(self, model: str, proxy: str) -> tuple[str, ...]:
        keys = self._hot_keys.get((model, proxy))
        if keys is None:
            keys = self._hot_keys[model, proxy] = self._keys.model(model).pick(HOT.keys, proxy)
        return keys

    async def _read(self, key: str) -> dict[bytes, bytes]:
        reply = await self._client.evalsha(READ, (key,), ())
        return pairs(reply[1:])


def _encoded(proxy: str, ops: Sequence[Op]) -> list[Argument]:
    """Write a batch as arguments of the hot script."""
    if len(ops) > MAX_BATCH:
        raise ValueError(f"a batch has at most {MAX_BATCH} operations, not {len(ops)}")
    args: list[Argument] = [proxy]
    for op in ops:
        if type(op) is Reserve:
            request, cost_tokens, tiebreak, affinity, exclude = op
            affinity, exclude = affinity[:MAX_CANDIDATES], exclude[-MAX_CANDIDATES:]
            args += ("A", request, cost_tokens, tiebreak, len(affinity), len(exclude))
            for candidate in affinity:
                args += candidate
            args += exclude
        elif type(op) is Adopt:
            args += ("D", op.request, op.rid, op.cost_tokens)
        else:
            args += ("R", op.request)
    return args


def _decoded(reply: list[Any]) -> BatchReply:
    """Read the hot script's reply."""
    results: list[str | bool] = [
        part.decode("utf-8", "replace") if type(part) is bytes else part == 1 for part in reply
    ]
    ver = results.pop(0)
    return BatchReply(whole_number(ver), results)


def _leases(fields: Mapping[bytes, bytes]) -> dict[str, Lease]:
    """Read a lease hash; a field that does not parse holds nothing."""
    leases: dict[str, Lease] = {}
    for field, value in fields.items():
        rid, _, cost = text_of(value).rpartition(" ")
        if rid and cost.isdigit():
            request = text_of(field)
            leases[request] = Lease(request=request, rid=rid, cost_tokens=int(cost))
    return leases
