"""`redmesh doctor`: gathers facts of this machine and of the mesh, and shows what they mean."""

import os
import shutil
import time
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from services.cli import checks, meshplan, observing
from services.cli.checks import Check, Verdict
from services.cli.observing import health_problem, members
from services.cli.session import Session, common_options
from services.cli.tables import console, table
from shared.clock import SystemClock
from shared.errors import NotFoundError, RedmeshError, RegistryError
from shared.models.host import MemberKind
from shared.registry import Registry

PINGS: Final = 11


@click.command("doctor")
@click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True
)
@common_options
def doctor_command(session: Session, *, output: str) -> int:
    """Check this machine and the mesh; exit code 1 if something fails.

    Without a mesh, only the machine is checked.
    """
    found = machine(session.state.path)
    try:
        session.run(lambda registry: _mesh(registry, found))
    except NotFoundError as error:
        found.append(Check(name="mesh", verdict=Verdict.SKIP, found=str(error)))
        found.append(_ports(8000))
    except RegistryError as error:
        found.append(Check(name="redis", verdict=Verdict.FAIL, found=str(error)))
    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
    else:
        _show(found)
    return 1 if any(check.verdict is Verdict.FAIL for check in found) else 0


def machine(state_dir: Path) -> list[Check]:
    """Check what concerns only this machine."""
    place = next(path for path in (state_dir, *state_dir.parents) if path.exists())
    return [
        checks.python(),
        checks.engine(meshplan.engine_problem(meshplan.engine_python(os.environ))),
        checks.space(
            "disk",
            _free(place),
            checks.LEAST_DISK_BYTES,
            f"make room on the file system of {place}: logs and weights need it",
        ),
        checks.space(
            "shared memory",
            _free(Path("/dev/shm")),  # noqa: S108 - asked for its size only
            checks.LEAST_SHM_BYTES,
            "engines on several GPUs share memory there: in a container use --shm-size or "
            "--ipc=host",
        ),
    ]


def _free(path: Path) -> int | None:
    return shutil.disk_usage(path).free if path.exists() else None


def _ports(port: int) -> Check:
    try:
        meshplan.check_ports(meshplan.Wish(port=port, proxies=2, controllers=1, hosts=1))
    except RedmeshError as error:
        return Check(name="ports", verdict=Verdict.WARN, found=str(error), remedy="use `up --port`")
    return Check(name="ports", verdict=Verdict.OK, found=f"{port} and {port + 1} are free")


async def _mesh(registry: Registry, found: list[Check]) -> int:
    """Check Redis and what it knows of the fleet; append to `found` as far as it gets."""
    connection = registry.connection
    found.append(
        Check(name="redis", verdict=Verdict.OK, found=f"answers at {connection.shown_url}")
    )
    samples_ms: list[float] = []
    for _ in range(PINGS):
        began_s = time.perf_counter()
        await connection.ping()
        samples_ms.append((time.perf_counter() - began_s) * 1000)
    found.append(checks.latency(samples_ms))
    info = await _info(registry)
    found += [checks.redis_version(info), checks.eviction(info)]
    clock = SystemClock()
    before_ms = clock.now_ms()
    redis_ms = await registry.replicas.server_time_ms()
    found.append(checks.clock_skew(before_ms, redis_ms, clock.now_ms()))
    seen = await registry.fleet.members()
    hosts = await registry.fleet.hosts()
    deployments = await registry.fleet.deployments()
    found.append(checks.leader(await observing.leader_of(registry), seen))
    found.append(checks.agents(sorted(hosts), seen))
    alive = await members(registry, MemberKind.PROXY)
    found.append(checks.proxies({each.id: await health_problem(each) for each in alive}))
    corrupt = {
        "members": seen.corrupt,
        "hosts": hosts.corrupt,
        "deployments": deployments.corrupt,
    }
    for model, deployment in sorted(deployments.items()):
        snapshot = await registry.replicas.snapshot(model)
        corrupt[f"replicas of {model}"] = snapshot.corrupt
        found.append(checks.deployment(model, deployment, list(snapshot.replicas.values())))
    found.append(checks.foreign(corrupt))
    return 0


async def _info(registry: Registry) -> dict[str, str]:
    """Read INFO; empty where the server does not let us (managed services, clusters)."""
    try:
        reply: Any = await registry.connection.command("INFO")
    except RegistryError:
        return {}
    if isinstance(reply, bytes):
        lines = reply.decode(errors="replace").splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)
    if isinstance(reply, dict):
        return {str(name): str(value) for name, value in reply.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType] - redis-py parses INFO into an untyped dict
    return {}


def _show(found: list[Check]) -> None:
    screen = console()
    screen.print(
        table(
            ("CHECK", "VERDICT", "FOUND"),
            [
                (
                    check.name,
                    check.verdict,
                    f"{check.found}\n→ {check.remedy}" if check.remedy else check.found,
                )
                for check in found
            ],
            wraps="FOUND",
        )
    )
