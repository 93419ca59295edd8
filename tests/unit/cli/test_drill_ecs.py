"""The ECS injector against moto's server: the right task is stopped, and no other."""

from collections.abc import Generator
from typing import Any

import aioboto3  # pyright: ignore[reportMissingTypeStubs] - the library has none
import pytest
from moto.server import ThreadedMotoServer

from services.cli.drill import catalogue, ecs
from services.cli.drill.options import Target
from services.cli.drill.scene import Scene
from shared.errors import InvalidInputError, RedmeshError
from shared.models.deployment import Deployment, DeploymentSpec
from shared.models.host import Member, MemberKind

CLUSTER = "mesh"
DRAIN = catalogue.find("proxy-drain")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Generator[str]:
    """Run moto's server and point the AWS client at it."""
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    yield f"http://{host}:{port}"
    running.stop()


def scene(*addresses: str) -> Scene:
    """Make a mesh whose proxies are at `addresses`."""
    return Scene(
        model="m",
        deployment=Deployment(spec=DeploymentSpec(name="m"), generation=1, replicas=0),
        replicas={},
        members=tuple(
            Member(
                kind=MemberKind.PROXY,
                id=f"p{number}",
                host=f"h{number}",
                pid=1,
                version="0",
                started_ms=1,
                url=f"http://{address}:8000",
            )
            for number, address in enumerate(addresses)
        ),
        hosts={},
        leader="",
        target=Target(),
    )


async def two_tasks() -> dict[str, str]:
    """Run two Fargate tasks in a cluster; private address → ARN."""
    session: Any = aioboto3.Session()
    async with session.client("ec2") as ec2:
        vpc = await ec2.create_vpc(CidrBlock="10.0.0.0/16")
        await ec2.modify_vpc_attribute(
            VpcId=vpc["Vpc"]["VpcId"], EnableDnsHostnames={"Value": True}
        )
        group = await ec2.create_security_group(
            GroupName="tasks", Description="tasks", VpcId=vpc["Vpc"]["VpcId"]
        )
        subnet = await ec2.create_subnet(VpcId=vpc["Vpc"]["VpcId"], CidrBlock="10.0.1.0/24")
    async with session.client("ecs") as client:
        await client.create_cluster(clusterName=CLUSTER)
        await client.register_task_definition(
            family="proxy",
            networkMode="awsvpc",
            requiresCompatibilities=["FARGATE"],
            cpu="256",
            memory="512",
            containerDefinitions=[{"name": "proxy", "image": "redmesh", "memory": 256}],
        )
        ran = await client.run_task(
            cluster=CLUSTER,
            taskDefinition="proxy",
            launchType="FARGATE",
            count=2,
            networkConfiguration={
                "awsvpcConfiguration": {
                    "subnets": [subnet["Subnet"]["SubnetId"]],
                    "securityGroups": [group["GroupId"]],
                }
            },
        )
        arns = [task["taskArn"] for task in ran["tasks"]]
        described = await client.describe_tasks(cluster=CLUSTER, tasks=arns)
    return {
        address: task["taskArn"] for task in described["tasks"] for address in ecs.addresses(task)
    }


async def status(arn: str) -> str:
    """Ask what becomes of a task."""
    session: Any = aioboto3.Session()
    async with session.client("ecs") as client:
        described = await client.describe_tasks(cluster=CLUSTER, tasks=[arn])
    return str(described["tasks"][0]["desiredStatus"])


async def test_the_task_of_the_struck_member_is_stopped(server: str) -> None:
    """The task with the proxy's address is stopped; the other one runs on."""
    tasks = await two_tasks()
    assert len(tasks) == 2
    (victim, spared) = sorted(tasks)
    injection = await ecs.prepare(DRAIN, scene(victim, spared), CLUSTER)
    assert injection.struck.member == "proxy:p0"
    assert victim in injection.told
    await injection.strike()
    assert await status(tasks[victim]) == "STOPPED"
    assert await status(tasks[spared]) == "RUNNING"


async def test_an_address_without_a_task_is_refused(server: str) -> None:
    """Nothing is stopped when no task has the member's address."""
    await two_tasks()
    with pytest.raises(InvalidInputError, match="awsvpc"):
        await ecs.prepare(DRAIN, scene("192.0.2.1", "192.0.2.2"), CLUSTER)


async def test_what_aws_refuses_is_told_with_the_remedy(server: str) -> None:
    """A cluster that does not exist is one message that names the rights needed."""
    with pytest.raises(RedmeshError, match="ecs:StopTask"):
        await ecs.prepare(DRAIN, scene("192.0.2.1", "192.0.2.2"), "nowhere")


async def test_without_a_cluster_nothing_is_asked() -> None:
    """The option that is missing is named."""
    with pytest.raises(InvalidInputError, match="--ecs-cluster"):
        await ecs.prepare(DRAIN, scene("a", "b"), "")
