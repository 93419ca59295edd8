"""The records of replicas: created, moved along the table of states, and read, all atomically.

Two writers share a record. The controller writes under its fence; the agent writes under the
incarnation (`gen`) of the engine that it runs. Either may lose a race: that is a `Refused`, which
names what Redis knows, and the loser reads again. Routes change with the record: a replica that
leaves READY is out of the ready set in the same step.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec

from shared.errors import InvalidInputError
from shared.ids import check_name, is_name
from shared.models.replica import Replica, ReplicaState
from shared.models.routing import Snapshot
from shared.registry.connection import Argument, Connection
from shared.registry.keys import Keys
from shared.registry.loader import ScriptSpec
from shared.registry.results import (
    Fence,
    Refused,
    Written,
    fence_args,
    pairs,
    refused,
    text_of,
    whole_number,
)
from shared.registry.specs import parse_spec

_RECORD: Final = ("fence", "replicas", "ver", "ready", "weight", "cost", "nreq")

CREATE: Final = ScriptSpec("replica/create", "M", _RECORD, ("OK", "FENCED", "EXISTS", "ILLEGAL"))
TRANSITION: Final = ScriptSpec(
    "replica/transition",
    "M",
    _RECORD,
    ("OK", "FENCED", "ABSENT", "STALEGEN", "CONFLICT", "ILLEGAL"),
)
DELETE: Final = ScriptSpec(
    "replica/delete",
    "M",
    ("fence", "replicas", "ver", "ready", "weight", "hb", "stat"),
    ("OK", "FENCED", "ABSENT", "STALEGEN", "ILLEGAL"),
)
SNAPSHOT: Final = ScriptSpec("replica/snapshot", "M", ("ver", "replicas", "spec"), ("OK",))
HEARTBEAT: Final = ScriptSpec("replica/heartbeat", "M", ("hb", "replicas", "stat"), ("OK",))
PULSE: Final = ScriptSpec("replica/pulse", "M", ("hb", "stat"), ("OK",))

_PATCHABLE: Final = frozenset(Replica.__struct_fields__) - {
    "rid",
    "model",
    "gen",
    "state",
    "ver",
    "since_ms",
}
_NO_PATCH: Final[Mapping[str, object]] = MappingProxyType({})


class ReplicaBeat(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent says of one live replica."""

    rid: str
    gen: int
    running: int = 0
    """Requests the engine computes."""
    waiting: int = 0
    """Requests in the engine's own queue."""
    kv_usage: float = 0.0
    """Share of the KV cache in use, 0 to 1."""


class ReplicaStat(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine last reported."""

    running: int
    waiting: int
    kv_usage: float
    at_ms: int


class Pulse(msgspec.Struct, frozen=True, kw_only=True):
    """Heartbeats and reports of a model's replicas at one moment of Redis' clock."""

    now_ms: int
    beats_ms: dict[str, int]
    stats: dict[str, ReplicaStat]


class Replicas:
    """The replica records of every model."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys
        self._decoder = msgspec.json.Decoder(Replica)

    async def create(self, fence: Fence, replica: Replica) -> Written | Refused:
        """Record a new PENDING replica as the leader."""
        return await self._create(replica, fence)

    async def register(self, replica: Replica) -> Written | Refused:
        """Record a replica that runs but is not in Redis any more, as its agent."""
        return await self._create(replica, None)

    async def transition(
        self,
        rid: str,
        model: str,
        *,
        gen: int,
        expect: ReplicaState,
        to: ReplicaState,
        fence: Fence | None,
        patch: Mapping[str, object] = _NO_PATCH,
    ) -> Written | Refused:
        """Move a replica from `expect` to `to` and patch its record in the same step.

        With a fence it is the leader's write, without one its agent's.
        """
        return await self._write(rid, model, gen, (str(expect), str(to)), patch, fence)

    async def patch(
        self, rid: str, model: str, *, gen: int, patch: Mapping[str, object], fence: Fence | None
    ) -> Written | Refused:
        """Patch a record in whatever state it is."""
        return await self._write(rid, model, gen, ("", ""), patch, fence)

    async def delete(self, fence: Fence, model: str, rid: str, gen: int) -> Written | Refused:
        """Remove the record of a replica that is STOPPED or FAILED."""
        keys = self._keys.model(model)
        reply = await self._connection.evalsha(
            DELETE, keys.pick(DELETE.keys), (keys.channel, rid, gen, fence.epoch, fence.owner)
        )
        return _outcome(reply)

    async def heartbeat(self, model: str, beats: Sequence[ReplicaBeat]) -> list[str]:
        """Say which replicas live; returns those unknown to Redis or of another incarnation."""
        args: list[Argument] = []
        for beat in beats:
            percent = round(min(1.0, max(0.0, beat.kv_usage)) * 100)
            args += (beat.rid, beat.gen, beat.running, beat.waiting, percent)
        keys = self._keys.model(model).pick(HEARTBEAT.keys)
        reply = await self._connection.evalsha(HEARTBEAT, keys, args)
        return [text_of(rid) for rid in reply[1:]]

    async def snapshot(self, model: str) -> Snapshot:
        """Read all that routing needs of a model; an unknown model gives an empty snapshot."""
        keys = self._keys.model(model).pick(SNAPSHOT.keys)
        _, ver, records, spec = await self._connection.evalsha(SNAPSHOT, keys, ())
        replicas: dict[str, Replica] = {}
        corrupt: list[str] = []
        for field, value in pairs(records).items():
            rid = text_of(field)
            replica = self._parse(model, rid, value)
            if replica is None:
                corrupt.append(rid)
            else:
                replicas[rid] = replica
        return Snapshot(
            model=model,
            ver=whole_number(ver),
            spec=parse_spec(model, {text_of(k): text_of(v) for k, v in pairs(spec).items()}),
            replicas=replicas,
            corrupt=tuple(corrupt),
        )

    async def pulse(self, model: str) -> Pulse:
        """Read heartbeats, engine reports and Redis' time in one step."""
        keys = self._keys.model(model).pick(PULSE.keys)
        _, now, beats, stats = await self._connection.evalsha(PULSE, keys, ())
        parsed: dict[str, ReplicaStat] = {}
        for rid, text in pairs(stats).items():
            parts = text_of(text).split()
            if len(parts) == 4 and all(part.isdigit() for part in parts):
                running, waiting, percent, at_ms = (int(part) for part in parts)
                parsed[text_of(rid)] = ReplicaStat(
                    running=running, waiting=waiting, kv_usage=percent / 100, at_ms=at_ms
                )
        return Pulse(
            now_ms=whole_number(now),
            beats_ms={text_of(rid): whole_number(ms) for rid, ms in pairs(beats).items()},
            stats=parsed,
        )

    async def heartbeats(self, model: str) -> dict[str, int]:
        """Read when each replica last beat, in Redis' milliseconds."""
        return (await self.pulse(model)).beats_ms

    async def stats(self, model: str) -> dict[str, ReplicaStat]:
        """Read what each engine last reported."""
        return (await self.pulse(model)).stats

    async def server_time_ms(self) -> int:
        """Read Redis' clock: incarnations and ages are counted by it."""
        seconds, micros = await self._connection.command("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    async def _create(self, replica: Replica, fence: Fence | None) -> Written | Refused:
        check_name("replica", replica.rid)
        keys = self._keys.model(replica.model)
        record = msgspec.json.encode(replica)
        reply = await self._connection.evalsha(
            CREATE, keys.pick(CREATE.keys), (keys.channel, replica.rid, record, *fence_args(fence))
        )
        return _outcome(reply)

    async def _write(
        self,
        rid: str,
        model: str,
        gen: int,
        states: tuple[str, str],
        patch: Mapping[str, object],
        fence: Fence | None,
    ) -> Written | Refused:
        wrong = sorted(set(patch) - _PATCHABLE)
        if wrong:
            raise InvalidInputError(f"a patch cannot set {', '.join(wrong)}", field=wrong[0])
        keys = self._keys.model(model)
        content = msgspec.json.encode(dict(patch))
        reply = await self._connection.evalsha(
            TRANSITION,
            keys.pick(TRANSITION.keys),
            (keys.channel, rid, gen, *states, content, *fence_args(fence)),
        )
        return _outcome(reply)

    def _parse(self, model: str, rid: str, value: bytes) -> Replica | None:
        try:
            replica = self._decoder.decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        sound = is_name(rid) and is_name(replica.host)
        return replica if sound and replica.rid == rid and replica.model == model else None


def _outcome(reply: list[Any]) -> Written | Refused:
    if reply[0] != b"OK":
        return refused(reply)
    return Written(whole_number(reply[1]), text_of(reply[2]))
