"""The plan: from the world as it is to the actions that bring it nearer to what is declared. Pure.

Invariants, whatever the world looks like and wherever earlier plans were cut short:
1. Level-triggered: a plan follows from one reading of the world and nothing else. Cut it short
   anywhere, change the leader, plan again: the end is the same.
2. What is not declared is not touched, and what is missing stops nothing. An empty registry is
   lost data, not a wish.
3. A replica has one order, on its own host, and that order follows from its record's state.
4. A serving replica is retired only while the wanted number stays READY without it, and living
   replicas are made at most one more than wanted (`scaling`).
5. Silence is not death, and never more than 30 % of a model is doubted at once (`health`).
6. What keeps failing is replaced more and more slowly (`backoff`).

Order within a plan: the routing spec, health, ended records, retiring, creating, orders, and last
the things that nobody needs any more.
"""

from typing import Final

from services.controller.actions import (
    Action,
    DropHold,
    DropOrder,
    ForgetHost,
    ForgetMember,
    ForgetModel,
    PatchReplica,
    PutOrder,
    WriteSpec,
)
from services.controller.draft import Draft, order_for, tell
from services.controller.external import serve_urls
from services.controller.health import sweep
from services.controller.scaling import clear_ended, scale
from services.controller.world import ModelView, World
from shared.models.deployment import Deployment, EngineKind
from shared.models.event import Event
from shared.models.host import MemberKind
from shared.models.order import Order
from shared.models.replica import ReplicaState
from shared.models.routing import ModelSpec

FORGET_MS: Final = 3_600_000
"""A host or process that has been silent for this long is forgotten."""
RESTORED_MS: Final = 5_000
"""A deployment that is older than this and has no routing spec has lost its data."""


def plan(world: World) -> list[Action]:
    """Decide what to do next, in order."""
    draft = Draft(world)
    for model in sorted(world.models):
        view = world.models[model]
        _write_spec(draft, view)
        if view.spec.epoch is None:
            # Nobody has led since this model's data began; look again once that is written.
            continue
        sweep(draft, model)
        wanted = wanted_replicas(view.deployment)
        clear_ended(draft, model, wanted)
        if view.deployment.spec.engine.kind is EngineKind.EXTERNAL:
            serve_urls(draft, model, view.deployment.spec.engine.urls if wanted else ())
        else:
            scale(draft, model, wanted)
        _tune(draft, view)
    _heal_orders(draft)
    _forget(draft)
    return draft.actions


def wanted_replicas(deployment: Deployment) -> int:
    """Count the replicas a deployment wants: for external ones one per URL, or none."""
    if deployment.deleted or deployment.replicas <= 0:
        return 0
    if deployment.spec.engine.kind is EngineKind.EXTERNAL:
        return len(deployment.spec.engine.urls)
    return deployment.replicas


def wanted_spec(view: ModelView, now_ms: int) -> ModelSpec:
    """Derive the routing spec that a deployment and its replicas call for."""
    deployment = view.deployment
    spec = deployment.spec
    lengths = [
        replica.max_model_len_tokens
        for replica in view.replicas.values()
        if replica.state is ReplicaState.READY and replica.max_model_len_tokens > 0
    ]
    declared = spec.engine.max_model_len_tokens or 0
    # Without any READY replica the length reported before still is the best there is to say.
    known = min(lengths) if lengths else view.spec.max_model_len_tokens or declared
    return ModelSpec(
        model=spec.name,
        aliases=spec.aliases,
        runner=spec.engine.runner,
        generation=deployment.generation,
        desired_replicas=wanted_replicas(deployment),
        max_requests=spec.routing.max_requests,
        request_timeout_s=spec.routing.request_timeout_s,
        inter_byte_timeout_s=spec.routing.inter_byte_timeout_s,
        stream_failover=spec.stream_failover,
        prefix_affinity=spec.routing.prefix_affinity,
        affinity_absolute=spec.routing.affinity_absolute,
        affinity_relative=spec.routing.affinity_relative,
        max_model_len_tokens=known,
        created_ms=view.spec.created_ms or now_ms,
        epoch=view.spec.epoch,
    )


def _write_spec(draft: Draft, view: ModelView) -> None:
    world = draft.world
    wanted = wanted_spec(view, world.now_ms)
    if wanted == view.spec and wanted.epoch is not None:
        return
    declared_ms = world.now_ms - view.deployment.updated_ms
    if view.spec.epoch is None and not world.settled and declared_ms > RESTORED_MS:
        # Its data were lost. A spec would tell proxies that the replicas recorded now are all there
        # are, and end their streams on the others: agents get time to register what runs.
        return
    reason = "the routing spec differs from what is declared"
    draft.add(WriteSpec(spec=wanted, reason=reason, event=_spec_event(view, wanted)))


def _spec_event(view: ModelView, wanted: ModelSpec) -> Event | None:
    before, after = view.spec.desired_replicas, wanted.desired_replicas
    if before == after or view.spec.epoch is None or view.deployment.deleted:
        return None
    kind = "ScaledUp" if after > before else "ScaledDown"
    return tell(kind, f"deployment/{wanted.model}", f"from {before} to {after} replicas")


def _tune(draft: Draft, view: ModelView) -> None:
    """Carry a changed request cap to the replicas; it changes no engine, so no revision."""
    limit = view.deployment.spec.routing.max_requests_per_replica
    for replica in draft.living(view.deployment.spec.name):
        stored = view.replicas.get(replica.rid)
        if stored is not None and replica.state is stored.state and replica.max_requests != limit:
            reason = f"its request cap is {limit} now"
            draft.add(PatchReplica(replica=stored, max_requests=limit, reason=reason))


def _heal_orders(draft: Draft) -> None:
    """Make every order follow from its record, unless an action of this plan does so already."""
    world = draft.world
    known: set[tuple[str, str]] = set()
    for model in sorted(world.models):
        stored = world.models[model].replicas
        after = {replica.rid: replica for replica in draft.replicas(model)}
        for rid, replica in sorted(stored.items()):
            known.add((replica.host, rid))
            if rid not in after or after[rid].state is not replica.state:
                continue
            wanted = order_for(world, replica)
            given = world.orders.get(replica.host, {}).get(rid)
            if wanted is not None and (given is None or not _same(given, wanted)):
                reason = f"{replica.state} calls for the order to {wanted.action}"
                draft.add(PutOrder(host=replica.host, order=wanted, reason=reason))
    unreadable = {rid for view in world.models.values() for rid in view.corrupt}
    for host, orders in sorted(world.orders.items()):
        for rid, order in sorted(orders.items()):
            stray = (host, rid) not in known and rid not in unreadable
            if stray and order.model in world.models and world.settled:
                reason = "no record stands behind this order"
                draft.add(DropOrder(host=host, rid=rid, reason=reason))


def _same(given: Order, wanted: Order) -> bool:
    return (given.action, given.gen, given.revision, given.url) == (
        wanted.action,
        wanted.gen,
        wanted.revision,
        wanted.url,
    )


def _forget(draft: Draft) -> None:
    world = draft.world
    used = {replica.host for view in world.models.values() for replica in view.replicas.values()}
    quiet = all(world.agent_alive(host) for host in world.hosts)
    for model, view in sorted(world.models.items()):
        ordered = any(o.model == model for orders in world.orders.values() for o in orders.values())
        # A silent host may come back with an engine of this model: it must still be known then.
        if view.deployment.deleted and not view.replicas and not ordered and quiet:
            event = tell("DeploymentForgotten", f"deployment/{model}", "nothing of it is left")
            draft.add(ForgetModel(model=model, reason="deleted and drained", event=event))
    if not world.settled:
        return
    for field, silent_ms in sorted(world.members_silent_ms.items()):
        if silent_ms > FORGET_MS:
            reason = f"silent for {silent_ms // 60_000} minutes"
            kind, _, name = field.partition(":")
            if kind == MemberKind.AGENT.value and name in world.hosts:
                if name in used or world.orders.get(name):
                    continue
                event = tell("HostForgotten", f"host/{name}", reason)
                draft.add(ForgetHost(host=name, reason=reason, event=event))
            draft.add(ForgetMember(field=field, reason=reason))
    _drop_stale_holds(draft)


def _drop_stale_holds(draft: Draft) -> None:
    world = draft.world
    rids = {rid for view in world.models.values() for rid in view.replicas}
    for subject in sorted(world.holds):
        kind, _, name = subject.partition(":")
        if kind == "replica" and name not in rids:
            draft.add(DropHold(subject=subject, reason="its replica is gone"))
