"""What operators should hear of the world's own changes: two readings → events. Pure.

Actions tell their own events. These are about what others did: an agent made a replica READY, a
host fell silent or came back, a rollout is complete. A notice may be missed when leadership moves;
nothing depends on one.
"""

from services.controller.draft import tell
from services.controller.plan import wanted_replicas
from services.controller.world import ModelView, World
from shared.models.event import Event, EventLevel
from shared.models.replica import ReplicaState


def notice(before: World | None, now: World) -> list[Event]:
    """Tell what changed between two readings; nothing for the first one."""
    if before is None:
        return []
    message = "its stored content does not parse and is left out: mend it, or delete it"
    events = [
        tell("CorruptRecord", subject, message, EventLevel.ERROR)
        for subject in sorted(set(now.corrupt) - set(before.corrupt))
    ]
    for host in sorted(now.hosts):
        was, is_now = before.agent_alive(host), now.agent_alive(host)
        subject = f"host/{host}"
        if host not in before.hosts:
            events.append(tell("HostJoined", subject, "its agent reported for work"))
        elif was and not is_now:
            silent_s = now.agent_silent_ms(host) // 1000
            message = f"its agent has been silent for {silent_s} s; what answers stays in service"
            events.append(tell("HostSilent", subject, message, EventLevel.WARNING))
        elif is_now and not was:
            events.append(tell("HostBack", subject, "its agent is heard again"))
    for model, view in sorted(now.models.items()):
        if model in before.models:
            events.extend(_model(before.models[model], view))
    return events


def _model(before: ModelView, view: ModelView) -> list[Event]:
    events: list[Event] = []
    for rid, replica in sorted(view.replicas.items()):
        old = before.replicas.get(rid)
        if replica.state is ReplicaState.READY and (
            old is None or old.state is not ReplicaState.READY
        ):
            took_s = (replica.since_ms - replica.gen) / 1000
            fresh = old is None or old.state in {ReplicaState.PENDING, ReplicaState.STARTING}
            message = f"in service after {took_s:.1f} s" if fresh else "in service again"
            events.append(tell("ReplicaReady", f"replica/{rid}", f"{message} on {replica.host}"))
    name = view.deployment.spec.name
    revision = view.deployment.spec.revision()
    wanted = wanted_replicas(view.deployment)
    if _mixed(before, revision) and not _mixed(view, revision) and _ready(view) >= wanted > 0:
        message = f"all {_ready(view)} replicas run revision {revision}"
        events.append(tell("RolledOut", f"deployment/{name}", message))
    return events


def _mixed(view: ModelView, revision: str) -> bool:
    return any(
        replica.revision != revision
        and replica.state not in {ReplicaState.FAILED, ReplicaState.STOPPED}
        for replica in view.replicas.values()
    )


def _ready(view: ModelView) -> int:
    return sum(replica.state is ReplicaState.READY for replica in view.replicas.values())
