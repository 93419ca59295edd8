"""Tells how far a starting mesh is, and when it will not get there. Pure: it judges what was read.

Ready means that what is printed next will work: every proxy answers and knows a READY replica of
each model that wants one.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from shared.ids import slug
from shared.models.event import Event
from shared.models.replica import ENDED, Replica, ReplicaState

FAILURES_TO_GIVE_UP: Final = 3
"""So many failed replicas of a model, with none READY: waiting longer helps nobody."""


class ProxyView(msgspec.Struct, frozen=True, kw_only=True):
    """What one proxy's admin port says."""

    url: str
    problem: str | None = None
    """Why it is not ready; None: ready."""
    ready_replicas: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """Model → READY replicas in its table."""


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """One look at a starting mesh."""

    wanted: dict[str, int]
    """Model → replicas it shall have."""
    replicas: dict[str, tuple[Replica, ...]]
    proxies: tuple[ProxyView, ...]
    agents: int
    """Agents of this mesh that beat."""
    agents_wanted: int
    leader: bool
    events: tuple[Event, ...] = ()


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far it is: one line per thing, and whether all is done."""

    ready: bool
    lines: tuple[str, ...]


def progress(seen: Observed) -> Progress:
    """Say how far the mesh is."""
    parts: list[tuple[bool, str]] = [
        (seen.leader, "leader elected" if seen.leader else "no leader yet"),
        (
            seen.agents >= seen.agents_wanted,
            f"agents {min(seen.agents, seen.agents_wanted)}/{seen.agents_wanted}",
        ),
    ]
    usable = [proxy for proxy in seen.proxies if proxy.problem is None]
    parts.append(
        (len(usable) == len(seen.proxies), f"proxies {len(usable)}/{len(seen.proxies)} ready")
    )
    for model, wanted in sorted(seen.wanted.items()):
        parts.append(_model(model, wanted, seen.replicas.get(model, ()), usable))
    return Progress(ready=all(done for done, _ in parts), lines=tuple(text for _, text in parts))


def _model(
    model: str, wanted: int, replicas: Sequence[Replica], proxies: Sequence[ProxyView]
) -> tuple[bool, str]:
    ready = sum(replica.state is ReplicaState.READY for replica in replicas)
    known = all(proxy.ready_replicas.get(model, 0) >= min(ready, 1) for proxy in proxies)
    states: dict[str, int] = {}
    for replica in replicas:
        if replica.state is not ReplicaState.READY and replica.state not in ENDED:
            states[replica.state] = states.get(replica.state, 0) + 1
    rest = "".join(f", {count} {state}" for state, count in sorted(states.items()))
    return ready >= wanted and known, f"{model} {ready}/{wanted} replicas ready{rest}"


def hopeless(seen: Observed) -> dict[str, list[Event]]:
    """Name the models that keep failing, with the events that say why."""
    found: dict[str, list[Event]] = {}
    for model, wanted in seen.wanted.items():
        if any(each.state is ReplicaState.READY for each in seen.replicas.get(model, ())):
            continue
        failures = failures_of(model, seen.events)
        if wanted and len({event.subject for event in failures}) >= FAILURES_TO_GIVE_UP:
            found[model] = failures
    return found


def failures_of(model: str, events: Sequence[Event]) -> list[Event]:
    """Choose the events that tell of failed replicas of `model`."""
    return [
        event
        for event in events
        if event.kind == "ReplicaFailed"
        and event.subject.removeprefix("replica/").rpartition("-")[0] == slug(model)
    ]
