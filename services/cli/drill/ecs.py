"""Injects the end of a task of Amazon ECS: StopTask on the task that runs a member of the fleet.

ECS sends SIGTERM and, when the container's stop timeout is over, SIGKILL; the service starts
another task. So this is a drain of a proxy, a polite change of leaders, or the loss of an agent
with its host, and no sudden death: sudden deaths are rehearsed by agents and signals.

A task is found by its private address (`awsvpc` networking), which is also the address under which
the member is known. Credentials and region come from the environment, as for every AWS client.
"""

import importlib
from typing import Any, Final
from urllib.parse import urlsplit

from services.cli.drill.catalogue import Drill, Fault
from services.cli.drill.injection import Injection, cannot
from services.cli.drill.local import struck_member
from services.cli.drill.scene import Scene
from shared.errors import InvalidInputError, RedmeshError
from shared.models.host import Member

FAULTS: Final = frozenset({Fault.PROXY_DRAIN, Fault.LEADER_KILL, Fault.AGENT_KILL})
_DESCRIBED: Final = 100
"""Tasks that ECS describes in one call, at most."""


async def prepare(drill: Drill, scene: Scene, cluster: str) -> Injection:
    """Find the member's task; raise `InvalidInputError` when there is none."""
    if not cluster:
        raise cannot(drill, "name the cluster of its tasks by --ecs-cluster")
    member = _victim(drill, scene)
    address = urlsplit(member.url or member.admin_url).hostname or ""
    async with _client() as client:
        task = await _asked(_find(client, cluster, address))
    if task is None:
        raise cannot(
            drill,
            f"no running task in the ECS cluster {cluster} has the address {address!r} of "
            f"{member.kind} {member.id}: tasks need awsvpc networking, and members must announce "
            "that address",
        )
    found: str = task

    async def strike() -> None:
        async with _client() as client:
            await _asked(
                client.stop_task(cluster=cluster, task=found, reason=f"redmesh drill {drill.name}")
            )

    told = f"ECS StopTask of {found.rpartition('/')[2]} ({member.kind} {member.id}, {address})"
    return Injection(told, struck_member(member), strike)


def _victim(drill: Drill, scene: Scene) -> Member:
    match drill.fault:
        case Fault.PROXY_DRAIN:
            return scene.victim_proxy()
        case Fault.LEADER_KILL:
            return scene.victim_leader()
        case _:
            return scene.victim_agent()


def _client() -> Any:  # noqa: ANN401 - the library makes its classes at run time
    try:
        library: Any = importlib.import_module("aioboto3")
    except ModuleNotFoundError:
        raise InvalidInputError(
            "--via ecs needs the package aioboto3: install redmesh[ecs]", field="--via"
        ) from None
    return library.Session().client("ecs")


async def _asked(call: Any) -> Any:  # noqa: ANN401 - any reply of AWS
    """Await a call; errors of AWS become one message that names the remedy."""
    errors: Any = importlib.import_module("botocore.exceptions")
    try:
        return await call
    except (errors.BotoCoreError, errors.ClientError) as error:
        raise RedmeshError(
            f"ECS refused: {error}. Check region and credentials (AWS_REGION, AWS_PROFILE), and "
            "the rights ecs:ListTasks, ecs:DescribeTasks and ecs:StopTask"
        ) from error


async def _find(client: Any, cluster: str, address: str) -> str | None:  # noqa: ANN401 - as above
    pages = client.get_paginator("list_tasks").paginate(cluster=cluster, desiredStatus="RUNNING")
    async for page in pages:
        arns: list[str] = page["taskArns"]
        for first in range(0, len(arns), _DESCRIBED):
            described = await client.describe_tasks(
                cluster=cluster, tasks=arns[first : first + _DESCRIBED]
            )
            for task in described["tasks"]:
                if address in addresses(task):
                    return str(task["taskArn"])
    return None


def addresses(task: dict[str, Any]) -> set[str]:
    """Read the private addresses of a task: of its network interface, and of its containers."""
    found = {
        str(detail["value"])
        for attachment in task.get("attachments", ())
        for detail in attachment.get("details", ())
        if detail.get("name") == "privateIPv4Address"
    }
    for container in task.get("containers", ()):
        for interface in container.get("networkInterfaces", ()):
            found.add(str(interface.get("privateIpv4Address", "")))
    return found - {""}
