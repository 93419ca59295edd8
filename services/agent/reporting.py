"""What the agent tells the registry: steps of state, records after a loss of data, beats, events.

Every write names the incarnation of the engine that it speaks of, and the state it expects; a
refusal is logged and decided anew at the next look, from what Redis says then.
"""

from collections.abc import Collection, Mapping
from typing import Final

import structlog

from services.agent.engine import Engine
from services.agent.reconcile import Phase, Report
from shared.models.event import Event, EventLevel
from shared.models.host import Host, Member
from shared.models.replica import Replica, ReplicaState
from shared.registry import Registry
from shared.registry.replicas import ReplicaBeat
from shared.registry.results import RefusalCode, Refused

_log = structlog.get_logger(__name__)

_STATE: Final = {
    Phase.STARTING: ReplicaState.STARTING,
    Phase.READY: ReplicaState.READY,
    Phase.UNHEALTHY: ReplicaState.UNHEALTHY,
}
_EVENTS: Final[Mapping[ReplicaState, tuple[str, EventLevel]]] = {
    ReplicaState.READY: ("ReplicaReady", EventLevel.INFO),
    ReplicaState.UNHEALTHY: ("ReplicaUnhealthy", EventLevel.WARNING),
    ReplicaState.FAILED: ("ReplicaFailed", EventLevel.ERROR),
}


class Reporter:
    """Writes to the registry on behalf of one host. Errors of the registry are the caller's."""

    def __init__(self, registry: Registry, host: str) -> None:
        self._registry = registry
        self._host = host

    async def step(self, report: Report, engine: Engine | None) -> bool:
        """Take one step of a replica's state; tells whether it was taken."""
        patch: dict[str, object] = {"reason": report.reason}
        if engine is not None and report.to in _STATE.values():
            patch |= _place(engine)
        outcome = await self._registry.replicas.transition(
            report.rid,
            report.model,
            gen=report.gen,
            expect=report.expect,
            to=report.to,
            patch=patch,
            fence=None,
        )
        if isinstance(outcome, Refused):
            _log.warning(
                "step_refused",
                rid=report.rid,
                expected=report.expect.value,
                to=report.to.value,
                code=outcome.code.value,
                detail=outcome.detail,
            )
            return False
        _log.info("step_taken", rid=report.rid, to=report.to.value, reason=report.reason)
        if report.to in _EVENTS:
            kind, level = _EVENTS[report.to]
            text = report.reason or f"{report.model} answers on {self._host}"
            await self._emit(kind, report.rid, text, level)
        return True

    async def amend(self, engine: Engine) -> None:
        """Correct where the replica's record says that its engine runs."""
        order = engine.order
        outcome = await self._registry.replicas.patch(
            order.rid, order.model, gen=order.gen, patch=_place(engine), fence=None
        )
        if isinstance(outcome, Refused):
            _log.warning("amend_refused", rid=order.rid, code=outcome.code.value)

    async def register(self, engine: Engine) -> None:
        """Write the record of an engine that runs but is not in Redis any more."""
        order = engine.order
        outcome = await self._registry.replicas.register(
            Replica(
                rid=order.rid,
                model=order.model,
                gen=order.gen,
                state=_STATE[engine.phase],
                host=self._host,
                revision=order.revision,
                kind=engine.kind,
                url=engine.endpoint.url,
                api_key_env=order.spec.engine.api_key_env,
                max_requests=order.spec.routing.max_requests_per_replica,
                max_model_len_tokens=engine.context_tokens,
                reason="registered again by its agent: its record was lost",
                pid=engine.view().pid,
            )
        )
        if not isinstance(outcome, Refused):
            _log.info("engine_registered", rid=order.rid)
            text = "its record was lost and its engine runs on"
            await self._emit("ReplicaRegistered", order.rid, text, EventLevel.WARNING)
        elif outcome.code is not RefusalCode.EXISTS:
            _log.warning("register_refused", rid=order.rid, code=outcome.code.value)

    async def beat(self, engines: Collection[Engine]) -> None:
        """Vouch for the engines that live, with their load."""
        beats: dict[str, list[ReplicaBeat]] = {}
        for engine in engines:
            if engine.beats:
                beats.setdefault(engine.order.model, []).append(
                    ReplicaBeat(
                        rid=engine.order.rid,
                        gen=engine.order.gen,
                        running=engine.load.running,
                        waiting=engine.load.waiting,
                        kv_usage=engine.load.kv_usage,
                    )
                )
        for model, lines in beats.items():
            await self._registry.replicas.heartbeat(model, lines)

    async def present(self, member: Member, host: Host | None) -> None:
        """Beat as a member of the fleet; with `host`, also (re-)register what this host has."""
        await self._registry.fleet.beat(member)
        if host is not None:
            await self._registry.fleet.put_host(host)

    async def _emit(self, kind: str, rid: str, message: str, level: EventLevel) -> None:
        await self._registry.fleet.emit(
            Event(
                kind=kind,
                subject=f"replica/{rid}",
                message=message,
                level=level,
                source=f"agent/{self._host}",
            )
        )


def _place(engine: Engine) -> dict[str, object]:
    view = engine.view()
    place: dict[str, object] = {"url": view.url, "pid": view.pid, "kind": view.kind.value}
    if engine.context_tokens:
        place["max_model_len_tokens"] = engine.context_tokens
    return place
