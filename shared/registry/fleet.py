"""What concerns the fleet as a whole: deployments, hosts, orders, members, holds and events.

Every hash is read whole and parsed field by field; a field that does not parse, or that holds
something of another name or of a name that may not come near a key, is left out and named in
`corrupt` of the result, so that foreign data can be reported and hurts nobody.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from shared.ids import check_name, is_name
from shared.models.deployment import Deployment
from shared.models.event import Event, EventLevel
from shared.models.host import Hold, Host, Member
from shared.models.order import Order
from shared.registry.connection import Argument, Connection
from shared.registry.keys import FLEET_KEYS, HOST_PART, Keys
from shared.registry.ledger import READ
from shared.registry.loader import ScriptSpec
from shared.registry.results import (
    Fence,
    Records,
    Refused,
    fence_args,
    pairs,
    refused,
    text_of,
    whole_number,
)

DECLARE: Final = ScriptSpec(
    "fleet/declare", "ctl", ("deployments", "revisions"), ("OK", "CONFLICT")
)
FORGET_DEPLOYMENT: Final = ScriptSpec(
    "fleet/forget_deployment",
    "ctl",
    ("epoch", "leader", "deployments", "revisions", "forgotten"),
    ("OK", "FENCED", "CONFLICT"),
)
ORDER: Final = ScriptSpec("fleet/order", "ctl", ("epoch", "leader", HOST_PART), ("OK", "FENCED"))
FORGET_HOST: Final = ScriptSpec(
    "fleet/forget_host",
    "ctl",
    ("epoch", "leader", "hosts", HOST_PART, "members", "hb"),
    ("OK", "FENCED"),
)
BEAT: Final = ScriptSpec("fleet/beat", "ctl", ("members", "hb"), ("OK",))
LEAVE: Final = ScriptSpec(
    "fleet/leave", "ctl", ("epoch", "leader", "members", "hb"), ("OK", "FENCED")
)
RELEASE: Final = ScriptSpec("fleet/release", "ctl", ("epoch", "leader", "holds"), ("OK", "FENCED"))
TELL: Final = ScriptSpec("fleet/tell", "ctl", ("epoch", "leader", "events"), ("OK", "FENCED"))
MEMBERS: Final = ScriptSpec("fleet/members", "ctl", ("members", "hb"), ("OK",))
SET_ASIDE: Final = ScriptSpec("fleet/set_aside", "*", ("*", "*"), ("OK",))

EVENTS_KEPT: Final = 10_000
ASIDE_MS: Final = 7 * 24 * 3600 * 1000
"""How long foreign data that stood in one of our keys is kept."""

T = TypeVar("T")


class MemberSeen(msgspec.Struct, frozen=True):
    """A member and how long ago Redis last heard of it; a lost beat counts as very long."""

    member: Member
    seen_ms_ago: int


class Fleet:
    """The fleet's records."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys.fleet

    async def deployments(self) -> Records[Deployment]:
        """Read every declared deployment by model."""
        return await self._records(self._keys.deployments, Deployment, lambda d: d.spec.name)

    async def declare(self, model: str, deployment: Deployment, expected_generation: int) -> bool:
        """Store a deployment if its generation is still the expected one (0: not there).

        Returns False when somebody else was faster: read again, decide again.
        """
        spec = deployment.spec
        reply = await self._connection.evalsha(
            DECLARE,
            self._keys.pick(DECLARE.keys),
            (
                check_name("model", model),
                expected_generation,
                msgspec.json.encode(deployment),
                spec.revision(),
                msgspec.json.encode(spec),
            ),
        )
        return reply[0] == b"OK"

    async def forget_deployment(self, fence: Fence, model: str) -> Refused | None:
        """Remove a deployment that is marked deleted, with its revisions."""
        keys = self._keys.pick(FORGET_DEPLOYMENT.keys)
        args = (fence.epoch, fence.owner, model)
        return _refusal(await self._connection.evalsha(FORGET_DEPLOYMENT, keys, args))

    async def forgotten(self) -> Records[Deployment]:
        """Read the deployments that were deleted and are gone, as they were last, by model."""
        return await self._records(self._keys.forgotten, Deployment, lambda d: d.spec.name)

    async def bury(self, deployment: Deployment) -> None:
        """Note that a deployment was deleted and is gone, after that note was lost."""
        await self._put(self._keys.forgotten, deployment.spec.name, deployment)

    async def exhume(self, model: str) -> None:
        """Drop the note that a model was deleted."""
        await self._connection.command("HDEL", self._keys.forgotten, model)

    async def hosts(self) -> Records[Host]:
        """Read every registered host by name."""
        return await self._records(self._keys.hosts, Host, lambda host: host.host)

    async def put_host(self, host: Host) -> None:
        """Register a host, as its agent."""
        check_name("host", host.host)
        await self._put(self._keys.hosts, host.host, host)

    async def forget_host(self, fence: Fence, host: str) -> Refused | None:
        """Remove a host with its orders."""
        keys = self._keys.pick(FORGET_HOST.keys, host)
        args = (fence.epoch, fence.owner, host)
        return _refusal(await self._connection.evalsha(FORGET_HOST, keys, args))

    async def orders(self, host: str) -> Records[Order]:
        """Read the orders to a host's agent by replica id."""
        return await self._records(self._keys.orders(host), Order, lambda order: order.rid)

    async def put_order(self, fence: Fence, host: str, order: Order) -> Refused | None:
        """Give an order to a host's agent; the same order again changes nothing."""
        return await self._order(fence, host, order.rid, msgspec.json.encode(order))

    async def drop_order(self, fence: Fence, host: str, rid: str) -> Refused | None:
        """Take an order back; its absence never stops an engine."""
        return await self._order(fence, host, rid, b"")

    async def beat(self, member: Member) -> None:
        """Say that a member lives and who it is."""
        check_name(member.kind, member.id)
        keys = self._keys.pick(BEAT.keys)
        await self._connection.evalsha(BEAT, keys, (member.field, msgspec.json.encode(member)))

    async def members(self) -> Records[MemberSeen]:
        """Read every member by `<kind>:<id>`, with how long ago it was last heard of."""
        keys = self._keys.pick(MEMBERS.keys)
        _, now, records, beats = await self._connection.evalsha(MEMBERS, keys, ())
        now_ms = whole_number(now)
        seen = pairs(beats)
        members, corrupt = _parse(pairs(records), Member, lambda member: member.field)
        return Records(
            {
                field: MemberSeen(
                    member, max(0, now_ms - whole_number(seen.get(field.encode(), b"0")))
                )
                for field, member in members.items()
            },
            corrupt,
        )

    async def forget_member(self, field: str) -> None:
        """Remove a member that leaves, as that member."""
        await self._leave(field, None)

    async def expel_member(self, fence: Fence, field: str) -> Refused | None:
        """Remove a member that has long been silent, as the leader."""
        return await self._leave(field, fence)

    async def holds(self) -> Records[Hold]:
        """Read every cordon and drain by subject."""
        return await self._records(self._keys.holds, Hold, lambda hold: hold.subject)

    async def put_hold(self, hold: Hold) -> None:
        """Ask to keep work away from a host or a replica."""
        check_name("hold", hold.subject)
        await self._put(self._keys.holds, hold.subject, hold)

    async def drop_hold(self, subject: str) -> bool:
        """Withdraw a hold, as an operator; tells whether there was one."""
        return (await self._release(subject, None))[1] == 1

    async def clear_hold(self, fence: Fence, subject: str) -> Refused | None:
        """Drop the hold of something that is gone, as the leader."""
        return _refusal(await self._release(subject, fence))

    async def emit(self, event: Event) -> None:
        """Append an event; the oldest beyond some ten thousand are dropped."""
        await self._connection.command(
            "XADD", self._keys.events, "MAXLEN", "~", EVENTS_KEPT, "*", *_event_fields(event)
        )

    async def tell(self, fence: Fence, event: Event) -> Refused | None:
        """Append an event as the leader: what a paused one noticed is no news any more."""
        args = (fence.epoch, fence.owner, EVENTS_KEPT, *_event_fields(event))
        return _refusal(await self._connection.evalsha(TELL, self._keys.pick(TELL.keys), args))

    async def events(self, count: int, after_id: str | None = None) -> list[Event]:
        """Read the newest `count` events, or the first `count` after `after_id`; oldest first."""
        key = self._keys.events
        if after_id is None:
            entries: list[Any] = await self._connection.command(
                "XREVRANGE", key, "+", "-", "COUNT", count
            )
            entries.reverse()
        else:
            entries = await self._connection.command(
                "XRANGE", key, f"({after_id}", "+", "COUNT", count
            )
        events: list[Event] = []
        for entry in entries:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                events.append(_event(text_of(entry[0]), entry[1]))
        return events

    async def quarantine(self) -> list[str]:
        """Set aside every key of the fleet that holds another type of data; returns which.

        Orders are looked after by the agent that they are for.
        """
        kinds = {
            self._keys.prefix + suffix: kind
            for suffix, kind in FLEET_KEYS.items()
            if suffix != HOST_PART
        }
        moved = await asyncio.gather(*(self.set_aside(key, kind) for key, kind in kinds.items()))
        return [key for key, done in zip(kinds, moved, strict=True) if done]

    async def set_aside(self, key: str, kind: str) -> bool:
        """Rename a key that holds anything but a `kind`; nothing is deleted for a week.

        Every script would stumble over it; what belongs there is written anew by those who know.
        """
        keys = (key, self._keys.aside(key))
        reply = await self._connection.evalsha(SET_ASIDE, keys, (kind, ASIDE_MS))
        return reply[1] == 1

    async def _records(self, key: str, kind: type[T], name: Callable[[T], str]) -> Records[T]:
        reply = await self._connection.evalsha(READ, (key,), ())
        return Records(*_parse(pairs(reply[1:]), kind, name))

    async def _put(self, key: str, field: str, record: msgspec.Struct) -> None:
        await self._connection.command("HSET", key, field, msgspec.json.encode(record))

    async def _order(self, fence: Fence, host: str, rid: str, order: bytes) -> Refused | None:
        keys = self._keys.pick(ORDER.keys, host)
        args = (fence.epoch, fence.owner, check_name("replica", rid), order)
        return _refusal(await self._connection.evalsha(ORDER, keys, args))

    async def _leave(self, field: str, fence: Fence | None) -> Refused | None:
        keys = self._keys.pick(LEAVE.keys)
        return _refusal(await self._connection.evalsha(LEAVE, keys, (field, *fence_args(fence))))

    async def _release(self, subject: str, fence: Fence | None) -> list[Any]:
        keys = self._keys.pick(RELEASE.keys)
        return await self._connection.evalsha(RELEASE, keys, (subject, *fence_args(fence)))


def _parse(
    fields: dict[bytes, bytes], kind: type[T], name_of: Callable[[T], str]
) -> tuple[dict[str, T], tuple[str, ...]]:
    decoder = msgspec.json.Decoder(kind)
    records: dict[str, T] = {}
    corrupt: list[str] = []
    for raw, value in fields.items():
        field = text_of(raw)
        try:
            record = decoder.decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError):
            corrupt.append(field)
            continue
        if is_name(field) and name_of(record) == field:
            records[field] = record
        else:
            corrupt.append(field)
    return records, tuple(corrupt)


def _event_fields(event: Event) -> list[Argument]:
    fields: list[Argument] = []
    for name in ("kind", "subject", "message", "level", "source"):
        fields += (name, str(getattr(event, name)))
    if event.at_ms:
        fields += ("at_ms", event.at_ms)
    return fields


def _event(stream_id: str, raw: dict[bytes, bytes] | list[bytes]) -> Event:
    fields = raw if isinstance(raw, dict) else pairs(raw)
    values = {text_of(name): text_of(value) for name, value in fields.items()}
    return Event(
        kind=values["kind"],
        subject=values["subject"],
        message=values["message"],
        level=EventLevel(values.get("level", EventLevel.INFO)),
        source=values.get("source", ""),
        at_ms=whole_number(values.get("at_ms")) or whole_number(stream_id.partition("-")[0]),
        id=stream_id,
    )


def _refusal(reply: list[Any]) -> Refused | None:
    return None if reply[0] == b"OK" else refused(reply)
