"""Foreign data in our keys: what does not parse is left out and told, and nobody stumbles.

Redis is shared ground. An operator's typing error, another program, or a newer release may put
anything into any key; traffic must go on, the control plane must go on with the rest, and what is
wrong must be said.
"""

import time
from collections.abc import AsyncGenerator, Generator

import httpx
import pytest
import pytest_asyncio

from shared.registry import Registry
from tests.support.mesh import Mesh, ready_replicas, sim_model, start, write_models
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mesh

MODEL = "sim"
JUNK = "junk-record"
ASIDE_BOUND_S = 3.0
"""Controllers look at their keys once a second, agents at their orders twice."""
KINDS = ("deployments", "replicas", "hosts", "proxies", "reservations", "events")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Generator[Mesh]:
    """Run one mesh for all foreign data of this file: it has to live through all of it."""
    models = write_models(
        tmp_path_factory.mktemp("models") / "models.json", sim_model(MODEL, step_ms=10)
    )
    with start(models) as running:
        yield running
        assert "Traceback" not in running.logs(lines=10_000)


@pytest_asyncio.fixture
async def registry(mesh: Mesh) -> AsyncGenerator[Registry]:
    """Open the registry, and give the mesh's processes back as they were."""
    pids = mesh.file().running
    async with mesh.registry() as opened:
        yield opened
    assert mesh.file().running == pids, "a process ended and was started again"


async def served(mesh: Mesh, count: int = 20) -> None:
    """Assert that each proxy answers `count` requests one after another."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    async with httpx.AsyncClient(timeout=10) as client:
        for url in mesh.urls:
            for _ in range(count):
                answer = await client.post(f"{url}/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text


async def scales(mesh: Mesh, registry: Registry) -> None:
    """Assert that the control plane still does what an operator asks."""
    for count in (2, 1):
        done = await mesh.ask("scale", MODEL, str(count))
        assert done.code == 0, done

        async def scaled(wanted: int = count) -> bool:
            replicas = (await registry.replicas.snapshot(MODEL)).replicas
            return (
                len(replicas) - (JUNK in replicas)
                == wanted
                == len(await ready_replicas(registry, MODEL))
            )

        await wait_until(scaled, timeout_s=30, what=f"{count} replicas are READY")


async def test_records_that_do_not_parse_are_left_out_and_told(
    mesh: Mesh, registry: Registry
) -> None:
    """Garbage beside good records: traffic and control go on, lists show the rest, events tell."""
    model, fleet = registry.keys.model(MODEL), registry.keys.fleet
    command = registry.connection.command
    host = next(iter(await registry.fleet.hosts()))
    for key, field, value in (
        (model.replicas, JUNK, "not json"),
        (model.replicas, f"{JUNK}-2", '{"rid": "x", "state": "DANCING"}'),
        (model.replicas, f"{JUNK}-3", "\x00\xff"),
        (fleet.deployments, JUNK, "{"),
        (fleet.hosts, JUNK, "[]"),
        (fleet.members, f"proxy:{JUNK}", "null"),
        (fleet.holds, f"host:{JUNK}", "7"),
        (fleet.orders(host), JUNK, '{"rid": 1}'),
        (model.wait, JUNK, "many"),
        (model.stat, JUNK, "?"),
    ):
        await command("HSET", key, field, value)
    await command("XADD", fleet.events, "*", "nonsense", "1")
    await command("PUBLISH", registry.keys.routes_channel(MODEL), "nonsense")
    await served(mesh)
    for kind in KINDS:
        done = await mesh.ask("get", kind, "-o", "json")
        assert done.code == 0, done
        assert done.clear, done
    await scales(mesh, registry)
    await served(mesh)

    async def told() -> bool:
        events = await registry.fleet.events(500)
        return all(
            any(name in event.subject + event.message for event in events)
            for name in (f"{JUNK}-2", JUNK)
        )

    await wait_until(told, what="an event names what did not parse")
    assert await command("HGET", fleet.deployments, JUNK) == b"{", "foreign data is not deleted"


async def test_fleet_keys_of_a_foreign_type_are_set_aside(mesh: Mesh, registry: Registry) -> None:
    """Foreign data in fleet keys are moved away, told, kept, and what was there is made anew."""
    command = registry.connection.command
    suffixes = ("deployments", "hosts", "members", "orders:local-1", "leader")
    keys = [f"redmesh:{{ctl}}:{suffix}" for suffix in suffixes]
    aside = [registry.keys.fleet.aside(key) for key in keys]
    await command("DEL", *keys)
    for key in keys:
        await command("LPUSH", key, "foreign")
    began_s = time.monotonic()

    async def moved() -> bool:
        return await command("EXISTS", *aside) == len(aside)

    await wait_until(moved, timeout_s=ASIDE_BOUND_S, what="the foreign data are set aside")
    print(f"\nset aside after {time.monotonic() - began_s:.2f} s")  # noqa: T201 - figures for the reader
    await served(mesh)
    for key in aside:
        assert await command("LRANGE", key, 0, -1) == [b"foreign"], "foreign data are not deleted"
        assert await command("TTL", key) > 0
    await command("DEL", *aside)
    await scales(mesh, registry)
    await served(mesh, 2)

    async def clean() -> bool:
        return (await mesh.ask("audit")).code == 0

    await wait_until(clean, timeout_s=20, what="audit clean")


@pytest.mark.parametrize("suffix", ["replicas", "ready", "px", "ver"])
async def test_a_model_key_of_a_foreign_type_stops_no_traffic(
    mesh: Mesh, registry: Registry, suffix: str
) -> None:
    """A model's key that holds something else: proxies go on by what they know."""
    await _swap(mesh, registry, f"redmesh:{{{MODEL}}}:{suffix}")


async def _swap(mesh: Mesh, registry: Registry, key: str) -> None:
    """Put foreign data in the place of `key` while requests come, then put the key back."""
    command = registry.connection.command
    kept = f"test-kept:{key}"
    exists = await command("EXISTS", key)
    if exists:
        await command("COPY", key, kept)
    await command("DEL", key)
    await command("LPUSH", key, "foreign")
    try:
        await served(mesh)
        for arguments in (("get", "replicas"), ("audit",)):
            done = await mesh.ask(*arguments)
            assert done.code in {0, 1}, done
            assert done.clear, done
            assert done.code == 0 or done.out + done.err
        assert await command("LRANGE", key, 0, -1) == [b"foreign"], "foreign data is not deleted"
    finally:
        await command("DEL", key)
        if await command("EXISTS", kept):  # a lease may have ended by itself meanwhile
            await command("RENAME", kept, key)
    await served(mesh, 2)

    async def clean() -> bool:
        return (await mesh.ask("audit")).code == 0

    await wait_until(clean, timeout_s=20, what="audit clean")
