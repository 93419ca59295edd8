"""What operators should hear of the world's own changes: two readings → events. Pure.

Actions tell their own events, and agents tell what becomes of their replicas. These are about the
rest: a host joined, fell silent or came back, a rollout is complete, stored content does not parse.
A notice may be missed when leadership moves; nothing depends on one.
"""

from typing import Final

import msgspec

from services.controller.draft import tell
from services.controller.plan import wanted_replicas
from services.controller.world import ModelView, World
from shared.models.event import Event, EventLevel
from shared.models.replica import ReplicaState
from shared.wording import listed

AGAIN_MS: Final = 60_000
"""What else does not parse in a key is told no sooner than this after the last word on it."""


class Told(msgspec.Struct, frozen=True):
    """The last word on one key."""

    names: frozenset[str]
    at_ms: int


class ForeignContent:
    """Remembers what does not parse in which key, and tells of it once for a key, not for a field.

    There may be a million fields, and others every second: a reading gives one event for each of
    our keys at most, and a key one each minute.
    """

    def __init__(self) -> None:
        self._told: dict[str, Told] | None = None

    def notice(self, world: World) -> list[Event]:
        """Tell of fields that were not told of; nothing for the first reading."""
        if self._told is None:
            self._told = {key: Told(names, world.now_ms) for key, names in world.corrupt.items()}
            return []
        events: list[Event] = []
        for key in sorted(self._told.keys() | world.corrupt.keys()):
            last, names = self._told.get(key), world.corrupt.get(key, frozenset())
            if last is not None and world.passed_ms(last.at_ms) < AGAIN_MS:
                continue
            if not names:
                del self._told[key]
                continue
            if last is not None and names <= last.names:
                self._told[key] = Told(names, last.at_ms)
                continue
            message = (
                f"fields that do not parse are left out: {listed(names)}; mend them, or delete them"
            )
            events.append(tell("CorruptRecord", f"key/{key}", message, EventLevel.ERROR))
            self._told[key] = Told(names, world.now_ms)
        return events


def notice(before: World | None, now: World) -> list[Event]:
    """Tell what changed between two readings; nothing for the first one."""
    if before is None:
        return []
    events: list[Event] = []
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
