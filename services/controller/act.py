"""Carries out a plan, one fenced write at a time.

Before each write the reign is asked; every write carries its epoch, so a write that was on its way
when leadership moved is refused in Redis. A refusal for any other reason means that the world has
moved on since it was read: the action is dropped, and the next plan decides anew.
"""

from collections.abc import Callable, Iterable

import msgspec
import structlog

from services.controller.actions import (
    Action,
    CreateReplica,
    DropHold,
    DropOrder,
    ForgetHost,
    ForgetMember,
    ForgetModel,
    Move,
    PatchReplica,
    PutOrder,
    RemoveReplica,
    Report,
    WriteSpec,
)
from services.controller.events import EventLog
from shared.errors import LeadershipLostError
from shared.ids import new_replica_id
from shared.models.event import Event
from shared.models.order import Order
from shared.registry import Registry
from shared.registry.results import Fence, RefusalCode, Refused
from shared.registry.specs import spec_fields

_log = structlog.get_logger(__name__)

Outcome = Refused | None


class Actor:
    """Does what plans ask for, within one reign."""

    def __init__(
        self,
        registry: Registry,
        events: EventLog,
        fence: Fence,
        may_act: Callable[[], bool],
        count: Callable[[str, str], None],
        new_id: Callable[[str], str] = new_replica_id,
    ) -> None:
        self._registry = registry
        self._events = events
        self._fence = fence
        self._may_act = may_act
        self._count = count
        self._new_id = new_id

    async def raise_fences(self, models: Iterable[str]) -> None:
        """Shut out every earlier leader from `models`, before anything of them is read.

        Raises LeadershipLostError when a later leader has done that to us already.
        """
        for model in models:
            self.check()
            self._accept(await self._registry.specs.raise_fence(self._fence, model))

    async def carry_out(self, actions: Iterable[Action]) -> int:
        """Do `actions` in order and return how many changed something.

        Raises LeadershipLostError as soon as the reign is over, and the registry's errors.
        """
        done = 0
        for action in actions:
            self.check()
            outcome = self._accept(await self._do(action))
            self._count(action.kind, "done" if outcome is None else outcome.code.lower())
            if outcome is not None:
                _log.info(
                    "action_refused",
                    action=action.kind,
                    code=outcome.code.value,
                    detail=outcome.detail,
                    reason=action.reason,
                )
                continue
            if isinstance(action, Report):
                if action.event is not None:
                    self.check()
                    self._accept(await self._events.emit_once(self._fence, action.event))
                continue
            done += 1
            _log.info("action", action=action.kind, reason=action.reason)
            if action.event is not None:
                await self.tell(action.event)
        return done

    async def tell(self, event: Event) -> None:
        """Tell operators something. Raises as `carry_out` does."""
        self.check()
        self._accept(await self._events.emit(self._fence, event))

    def check(self) -> None:
        """Raise LeadershipLostError once the reign is over."""
        if not self._may_act():
            raise LeadershipLostError("leadership ended while a plan was carried out")

    def _accept(self, answer: object) -> Outcome:
        if not isinstance(answer, Refused):
            return None
        if answer.code is RefusalCode.FENCED:
            raise LeadershipLostError(f"another controller leads (epoch {answer.detail})")
        return answer

    async def _do(self, action: Action) -> object:
        registry, fence = self._registry, self._fence
        answer: object
        match action:
            case WriteSpec(spec=spec):
                answer = await registry.specs.write(fence, spec.model, spec_fields(spec))
            case CreateReplica():
                answer = await self._create(action)
            case Move(replica=replica, to=to, order=order, reason=reason):
                written = await registry.replicas.transition(
                    replica.rid,
                    replica.model,
                    gen=replica.gen,
                    expect=replica.state,
                    to=to,
                    patch={"reason": reason},
                    fence=fence,
                )
                answer = await self._then_order(written, replica.host, order)
            case PatchReplica(replica=replica, max_requests=limit):
                answer = await registry.replicas.patch(
                    replica.rid,
                    replica.model,
                    gen=replica.gen,
                    patch={"max_requests": limit},
                    fence=fence,
                )
            case PutOrder(host=host, order=order):
                answer = await registry.fleet.put_order(fence, host, order)
            case DropOrder(host=host, rid=rid):
                answer = await registry.fleet.drop_order(fence, host, rid)
            case RemoveReplica(replica=replica):
                dropped = await registry.fleet.drop_order(fence, replica.host, replica.rid)
                answer = dropped or await registry.replicas.delete(
                    fence, replica.model, replica.rid, replica.gen
                )
            case _:
                answer = await self._forget(action)
        return answer

    async def _forget(self, action: Action) -> object:
        fleet, fence = self._registry.fleet, self._fence
        match action:
            case ForgetModel(model=model):
                forgotten = await self._registry.specs.forget(fence, model)
                if isinstance(forgotten, Refused):
                    return forgotten
                return await fleet.forget_deployment(fence, model)
            case ForgetHost(host=host):
                return await fleet.forget_host(fence, host)
            case ForgetMember(field=field):
                return await fleet.expel_member(fence, field)
            case DropHold(subject=subject):
                return await fleet.clear_hold(fence, subject)
            case _:
                return None

    async def _create(self, action: CreateReplica) -> object:
        gen = await self._registry.replicas.server_time_ms()
        rid = self._new_id(action.replica.model)
        replica = msgspec.structs.replace(action.replica, rid=rid, gen=gen)
        written = await self._registry.replicas.create(self._fence, replica)
        order = msgspec.structs.replace(action.order, rid=rid, gen=gen, issued_ms=gen)
        return await self._then_order(written, replica.host, order)

    async def _then_order(self, written: object, host: str, order: Order | None) -> object:
        if isinstance(written, Refused) or order is None:
            return written
        self.check()
        return await self._registry.fleet.put_order(self._fence, host, order)
