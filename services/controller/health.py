"""The leader's own health decisions, made when agents are silent or replicas stay unwell. Pure.

Invariants:
- Nothing is decided before the world has settled: after an outage every heartbeat is old.
- A silent agent is no dead engine. A serving replica is only doubted when its engine does not
  answer the leader either, and is given up only after a minute of that.
- Never more than 30 % of a model's replicas (but at least one) are doubted or given up at once,
  those of the last seconds included. If everything looks dead, it is more likely the leader that
  is cut off, and traffic is better served by replicas in doubt than by none.
"""

from typing import Final

from services.controller.draft import (
    DRAIN_TIMEOUT_S,
    SWEEP_PREFIX,
    Draft,
    tell,
)
from services.controller.world import LOST_MS, SILENT_MS, ModelView, World
from shared.models.event import Event, EventLevel
from shared.models.replica import ENDED, Replica, ReplicaState

SHARE_AT_ONCE: Final = 0.3
UNHEALTHY_MS: Final = 60_000
"""A replica that has been UNHEALTHY for longer than this is replaced."""
PENDING_MS: Final = 60_000
"""An agent that is alive begins within this, or the replica is tried elsewhere."""
RECENT_MS: Final = 15_000
"""A replica given up within this still counts as acted upon: its successor is not READY yet."""
MARGIN_MS: Final = 60_000
"""On top of what an agent is given, before the leader decides in its place."""

SILENT_REASON: Final = SWEEP_PREFIX + "no heartbeat and no answer"
"""Why the leader, not an agent, marked a replica UNHEALTHY: it may lift that mark itself."""


def budget(living: int) -> int:
    """Count how many of `living` replicas of one model may be acted upon at once."""
    return max(1, int(living * SHARE_AT_ONCE))


def sweep(draft: Draft, model: str) -> None:
    """Doubt, restore and give up replicas of `model`."""
    world = draft.world
    if not world.settled:
        return
    view = world.models[model]
    living = draft.living(model)
    left = budget(len(living)) - _acted_lately(draft.replicas(model), world)
    for replica in draft.replicas(model):
        if replica.state in ENDED:
            continue
        found = _judge(world, view, replica)
        if found is None:
            continue
        to, reason = found
        costs = to is not ReplicaState.READY and replica.state is not ReplicaState.DRAINING
        # One that is in doubt already was paid for when it was marked.
        paid = replica.state is ReplicaState.UNHEALTHY and _ours(replica)
        if costs and not paid:
            if left <= 0:
                continue
            left -= 1
        draft.move(replica, to, reason, _event(replica, to, reason))


Verdict = tuple[ReplicaState, str] | None


def _judge(world: World, view: ModelView, replica: Replica) -> Verdict:
    match replica.state:
        case ReplicaState.PENDING:
            return _judge_pending(world, replica)
        case ReplicaState.STARTING:
            limit_s = world.spec_of(replica).engine.startup_timeout_s
            late = f"not READY within {limit_s} s (engine.startup_timeout_s)"
            return _judge_under_way(world, replica, "started", limit_s, late)
        case ReplicaState.DRAINING:
            limit_s = DRAIN_TIMEOUT_S + world.spec_of(replica).engine.shutdown_timeout_s
            late = "it did not stop in time after draining"
            return _judge_under_way(world, replica, "drained", limit_s, late)
        case _:
            return _judge_serving(world, view, replica)


def _judge_pending(world: World, replica: Replica) -> Verdict:
    age_ms = world.now_ms - replica.since_ms
    if world.agent_silent_ms(replica.host) > SILENT_MS and age_ms > SILENT_MS:
        return _fail(f"the agent of {replica.host} went silent before it began")
    if age_ms > PENDING_MS:
        return _fail(f"the agent of {replica.host} did not begin within 60 s")
    return None


def _judge_under_way(
    world: World, replica: Replica, doing: str, limit_s: float, late: str
) -> Verdict:
    age_ms = world.now_ms - replica.since_ms
    if world.agent_silent_ms(replica.host) > LOST_MS and age_ms > LOST_MS:
        return _fail(f"the agent of {replica.host} went silent while it {doing}")
    if age_ms > limit_s * 1000 + MARGIN_MS:
        return _fail(late)
    return None


def _judge_serving(world: World, view: ModelView, replica: Replica) -> Verdict:
    silent_ms = silence_ms(world, view, replica)
    age_ms = world.now_ms - replica.since_ms
    answers = world.answers.get(replica.rid)
    if replica.state is ReplicaState.READY:
        if silent_ms > SILENT_MS and answers is False:
            return ReplicaState.UNHEALTHY, f"{SILENT_REASON} for {silent_ms // 1000} s"
        return None
    if silent_ms > SILENT_MS:
        if answers is True and _ours(replica):
            return ReplicaState.READY, "it answers the leader again"
        if answers is False and silent_ms > LOST_MS:
            return _fail(f"silent and not answering for {silent_ms // 1000} s")
    if age_ms > UNHEALTHY_MS:
        return ReplicaState.DRAINING, f"{SWEEP_PREFIX}unhealthy for {age_ms // 1000} s"
    return None


def silence_ms(world: World, view: ModelView, replica: Replica) -> int:
    """Tell how long nothing has been heard about a replica that serves or should."""
    heard_ms = view.beats_ms.get(replica.rid, 0)
    if replica.state is ReplicaState.READY or heard_ms == 0:
        heard_ms = max(heard_ms, replica.since_ms)
    return max(0, world.now_ms - heard_ms)


def _fail(why: str) -> tuple[ReplicaState, str]:
    return ReplicaState.FAILED, SWEEP_PREFIX + why


def _ours(replica: Replica) -> bool:
    return replica.reason.startswith(SILENT_REASON)


def _acted_lately(replicas: list[Replica], world: World) -> int:
    return sum(
        replica.reason.startswith(SWEEP_PREFIX)
        and (
            replica.state is ReplicaState.UNHEALTHY
            or (
                replica.state in {ReplicaState.DRAINING, ReplicaState.FAILED}
                and world.passed_ms(replica.since_ms) < RECENT_MS
            )
        )
        for replica in replicas
    )


def _event(replica: Replica, to: ReplicaState, reason: str) -> Event:
    text = reason.removeprefix(SWEEP_PREFIX)
    subject = f"replica/{replica.rid}"
    match to:
        case ReplicaState.READY:
            return tell("ReplicaReady", subject, text)
        case ReplicaState.UNHEALTHY:
            return tell("ReplicaUnhealthy", subject, text, EventLevel.WARNING)
        case ReplicaState.DRAINING:
            return tell("ReplicaReplaced", subject, text, EventLevel.WARNING)
        case _:
            return tell("ReplicaFailed", subject, text, EventLevel.ERROR)
