"""What operators should hear of the world's own changes: two readings → events. Pure.

Actions tell their own events, and agents tell what becomes of their replicas. These are about the
rest: a host joined, fell silent or came back, a rollout is complete, stored content does not parse.
A notice may be missed when leadership moves; nothing depends on one.
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
            events.extend(_rollout(before.models[model], view))
    return events


def _rollout(before: ModelView, view: ModelView) -> list[Event]:
    name = view.deployment.spec.name
    revision = view.deployment.spec.revision()
    wanted = wanted_replicas(view.deployment)
    if _mixed(before, revision) and not _mixed(view, revision) and _ready(view) >= wanted > 0:
        message = f"all {_ready(view)} replicas run revision {revision}"
        return [tell("RolledOut", f"deployment/{name}", message)]
    return []


def _mixed(view: ModelView, revision: str) -> bool:
    return any(
        replica.revision != revision
        and replica.state not in {ReplicaState.FAILED, ReplicaState.STOPPED}
        for replica in view.replicas.values()
    )


def _ready(view: ModelView) -> int:
    return sum(replica.state is ReplicaState.READY for replica in view.replicas.values())
