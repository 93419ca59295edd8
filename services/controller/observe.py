"""Reads the whole fleet once, as one `World`. The only place where the planner's input is made."""

import asyncio
from collections.abc import Iterable

import msgspec

from services.controller.health import silence_ms
from services.controller.probing import Prober
from services.controller.world import SILENT_MS, ModelView, World
from shared.models.deployment import Deployment
from shared.models.host import MemberKind
from shared.models.order import Order
from shared.models.replica import Replica, ReplicaState
from shared.registry import Registry
from shared.registry.fleet import MemberSeen
from shared.registry.results import Records


async def observe(registry: Registry, prober: Prober, *, settled: bool) -> World:
    """Read everything that a plan depends on, and ask silent engines whether they are there.

    Raises the errors of the registry: a plan is made from a whole reading or not at all.
    """
    fleet = registry.fleet
    deployments, hosts, members, holds = await asyncio.gather(
        fleet.deployments(), fleet.hosts(), fleet.members(), fleet.holds()
    )
    models = dict(
        zip(
            deployments,
            await asyncio.gather(
                *(_view(registry, deployment) for deployment in deployments.values())
            ),
            strict=True,
        )
    )
    agents = _agents(members)
    replicas = [r for view in models.values() for r in view.replicas.values()]
    orders = await _orders(registry, {*hosts, *agents, *(r.host for r in replicas)})
    keys = registry.keys
    corrupt = {
        keys.fleet.deployments: deployments.corrupt,
        keys.fleet.hosts: hosts.corrupt,
        keys.fleet.members: members.corrupt,
        keys.fleet.holds: holds.corrupt,
        **{keys.fleet.orders(host): records.corrupt for host, records in orders.items()},
        **{keys.model(model).replicas: view.corrupt for model, view in models.items()},
    }
    world = World(
        now_ms=await registry.replicas.server_time_ms(),
        settled=settled,
        models=models,
        hosts=dict(hosts),
        agents_silent_ms=agents,
        orders={host: dict(records) for host, records in orders.items()},
        holds=dict(holds),
        answers={},
        members_silent_ms={field: seen.seen_ms_ago for field, seen in members.items()},
        corrupt={key: frozenset(names) for key, names in corrupt.items() if names},
    )
    return await _with_answers(world, prober)


def _agents(members: Records[MemberSeen]) -> dict[str, int]:
    return {
        seen.member.id: seen.seen_ms_ago
        for seen in members.values()
        if seen.member.kind is MemberKind.AGENT
    }


async def _view(registry: Registry, deployment: Deployment) -> ModelView:
    model = deployment.spec.name
    snapshot = await registry.replicas.snapshot(model)
    load: dict[str, int] = {}
    beats: dict[str, int] = {}
    if snapshot.replicas:
        pulse, totals = await asyncio.gather(
            registry.replicas.pulse(model), registry.ledger.totals(model)
        )
        beats = pulse.beats_ms
        load = {rid: total.cost_tokens for rid, total in totals.items()}
    return ModelView(
        deployment=deployment,
        spec=snapshot.spec,
        replicas=snapshot.replicas,
        beats_ms=beats,
        load_tokens=load,
        corrupt=snapshot.corrupt,
    )


async def _orders(registry: Registry, hosts: Iterable[str]) -> dict[str, Records[Order]]:
    names = sorted(hosts)
    found = await asyncio.gather(*(registry.fleet.orders(name) for name in names))
    return dict(zip(names, found, strict=True))


async def _with_answers(world: World, prober: Prober) -> World:
    silent: list[Replica] = [
        replica
        for view in world.models.values()
        for replica in view.replicas.values()
        if replica.state in {ReplicaState.READY, ReplicaState.UNHEALTHY}
        and silence_ms(world, view, replica) > SILENT_MS
    ]
    if not silent or not world.settled:
        return world
    answers = await asyncio.gather(*(prober.answers(replica) for replica in silent))
    found = {replica.rid: answer for replica, answer in zip(silent, answers, strict=True)}
    return msgspec.structs.replace(world, answers=found)
