"""How many replicas a deployment has, and of which revision. Pure.

Invariants, for deployments whose replicas are processes on our hosts:
- A READY replica is retired only while the wanted number stays READY without it.
- Living replicas are never made more than wanted + 1; the one more exists only to take the place
  of one that must go (an older revision, a host or replica that an operator drains).
- What serves nobody goes first: unhealthy, then not yet ready, then the least loaded and newest.
- A replica that has not begun is left to begin: it cannot drain, and its order may be in flight.
"""

from typing import Final

from services.controller.backoff import STABLE_MS, Backoff, assess, pause_ms
from services.controller.draft import SWEEP_PREFIX, Draft, tell
from services.controller.placement import Occupant, Unplaceable, place
from services.controller.world import AHEAD_MS, ModelView
from shared.models.deployment import DeploymentSpec
from shared.models.event import EventLevel
from shared.models.replica import Replica, ReplicaState

SURGE: Final = 1
FAILED_KEPT_MS: Final = 10_000
"""A failed record stays at least this long, so that its host's agent can obey the order to stop."""
SETTLE_MS: Final = 2_000
"""After a model's data began, agents may still be registering what runs: nothing is added yet."""


def scale(draft: Draft, model: str, wanted: int) -> None:
    """Bring the replicas of `model` to `wanted` of its current revision."""
    view = draft.world.models[model]
    revision = view.deployment.spec.revision()
    retire(draft, view, revision, wanted)
    living = draft.living(model)
    good = [r for r in living if not must_go(draft, r, revision)]
    missing = wanted - len(good)
    room = wanted + SURGE - len(living)
    backoff = assess_failures(draft, model, revision)
    if missing > 0 and room > 0 and may_create(draft, view, backoff):
        reason = _why(view, living, good, backoff)
        for number in range(min(missing, room)):
            which = f"{reason}, {len(good) + number + 1} of {wanted}"
            if not create(draft, view.deployment.spec, "", which):
                break


def retire(draft: Draft, view: ModelView, revision: str, wanted: int) -> None:
    """Drain what is too much or must go, as far as the wanted number stays READY."""
    model = view.deployment.spec.name
    living = draft.living(model)
    ready = sum(replica.state is ReplicaState.READY for replica in living)
    good = [r for r in living if not must_go(draft, r, revision)]
    surplus = sorted(good, key=lambda r: _retire_first(view, r))[: max(0, len(good) - wanted)]
    going = [(r, "too many replicas") for r in surplus]
    going += [(r, _why_go(draft, r)) for r in living if must_go(draft, r, revision)]
    for replica, reason in going:
        if replica.state is ReplicaState.PENDING:
            continue
        if replica.state is ReplicaState.READY:
            if ready - 1 < wanted:
                continue
            ready -= 1
        draft.move(
            replica,
            ReplicaState.DRAINING,
            reason,
            tell("ReplicaDraining", f"replica/{replica.rid}", reason),
        )


def must_go(draft: Draft, replica: Replica, revision: str) -> bool:
    """Tell whether a living replica is to be replaced by another."""
    return replica.revision != revision or draft.world.held(replica)


def assess_failures(draft: Draft, model: str, revision: str) -> Backoff:
    """Derive the backoff of `model` from the failures of its current revision.

    Those from before Redis' clock went back are as good as forgotten.
    """
    limit_ms = draft.world.now_ms + AHEAD_MS
    return assess(
        r
        for r in draft.replicas(model)
        if r.state is ReplicaState.FAILED and r.revision == revision and r.since_ms <= limit_ms
    )


def may_create(draft: Draft, view: ModelView, backoff: Backoff) -> bool:
    """Tell whether a replica may be added now, and report a crash loop if that is why not."""
    world = draft.world
    if world.passed_ms(view.spec.created_ms) < SETTLE_MS:
        return False
    if world.now_ms >= backoff.next_try_ms:
        return True
    if backoff.rounds > 1:
        pause_s = pause_ms(backoff.rounds) // 1000
        cause = backoff.last_reason.removeprefix(SWEEP_PREFIX) or "no reason given"
        message = f"{backoff.rounds} failures in a row; waiting {pause_s} s. Last: {cause}"
        subject = f"deployment/{view.deployment.spec.name}"
        draft.report("CrashLoopBackoff", subject, message, EventLevel.WARNING)
    return False


def create(draft: Draft, spec: DeploymentSpec, url: str, reason: str) -> bool:
    """Place and create one replica, or report why there is no place for it."""
    found = place(spec, draft.sites, draft.occupants)
    if isinstance(found, Unplaceable):
        message = f"no room for another replica of {spec.name}: {found.why}"
        draft.report("Unplaceable", f"deployment/{spec.name}", message, EventLevel.WARNING)
        return False
    occupant = Occupant(
        host=found.host,
        model=spec.name,
        kind=spec.engine.kind,
        resources=spec.resources,
        gpu_indices=found.gpu_indices,
    )
    draft.create(spec, occupant, url, reason)
    return True


def clear_ended(draft: Draft, model: str, wanted: int) -> None:
    """Remove ended records, but keep the failures that the backoff rests on."""
    world = draft.world
    view = world.models[model]
    revision = view.deployment.spec.revision()
    kept = assess_failures(draft, model, revision).evidence if wanted else ()
    if _stable(draft, model, revision, wanted):
        kept = ()
    for replica in draft.replicas(model):
        if replica.state is ReplicaState.STOPPED:
            draft.remove(replica, "it has stopped")
        elif replica.state is ReplicaState.FAILED and replica.rid not in kept:
            obeying = world.agent_alive(replica.host)
            if not obeying or world.passed_ms(replica.since_ms) >= FAILED_KEPT_MS:
                draft.remove(replica, "its failure is history")


def _stable(draft: Draft, model: str, revision: str, wanted: int) -> bool:
    ready_ms = [
        draft.world.now_ms - r.since_ms
        for r in draft.living(model)
        if r.state is ReplicaState.READY and r.revision == revision
    ]
    return len(ready_ms) >= wanted and all(age >= STABLE_MS for age in ready_ms)


def _retire_first(view: ModelView, replica: Replica) -> tuple[int, int, int, str]:
    order = {
        ReplicaState.UNHEALTHY: 0,
        ReplicaState.PENDING: 1,
        ReplicaState.STARTING: 2,
        ReplicaState.READY: 3,
    }
    load = view.load_tokens.get(replica.rid, 0)
    return order[replica.state], load, -replica.gen, replica.rid


def _why_go(draft: Draft, replica: Replica) -> str:
    if draft.world.held(replica):
        return "an operator drains it"
    return "replaced by a newer revision"


def _why(view: ModelView, living: list[Replica], good: list[Replica], backoff: Backoff) -> str:
    revision = view.deployment.spec.revision()
    leaving = [replica for replica in living if replica not in good]
    if any(replica.revision != revision for replica in leaving):
        return f"rolling to revision {revision}"
    if leaving:
        return f"taking over from {leaving[0].rid}, which an operator drains"
    if backoff.rounds:
        return "replacing a failed replica"
    return "replica"
