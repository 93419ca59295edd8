"""What was declared comes back after a loss, by whoever remembers it, and what was deleted not."""

from pathlib import Path

import pytest

from services.agent.remembering import NAME, Remembering
from shared.models.deployment import Deployment, DeploymentSpec
from shared.registry import Registry
from shared.registry.leadership import Leading
from shared.registry.memory import Memory
from shared.registry.results import Fence

SPEC = DeploymentSpec(name="m")


def version(generation: int, *, deleted: bool = False) -> Deployment:
    """Make a version of the deployment, each later than the one before."""
    return Deployment(
        spec=SPEC,
        generation=generation,
        replicas=generation,
        deleted=deleted,
        updated_ms=generation * 1000,
    )


async def lose_everything(registry: Registry) -> None:
    """Lose the fleet's declarations."""
    fleet = registry.keys.fleet
    await registry.connection.command("DEL", fleet.deployments, fleet.revisions, fleet.forgotten)


async def delete(registry: Registry, generation: int) -> None:
    """Delete the deployment, and let the leader forget it."""
    assert await registry.fleet.declare("m", version(generation, deleted=True), generation - 1)
    lease = await registry.leadership.try_lead("ct-1")
    assert isinstance(lease, Leading)
    fence = Fence(lease.epoch, "ct-1")
    assert await registry.fleet.forget_deployment(fence, "m") is None


async def test_a_loss_is_mended_by_a_memory(registry: Registry) -> None:
    """What is missing is declared again as it was, its spec under its revision too."""
    memory = Memory(registry.fleet)
    assert await registry.fleet.declare("m", version(1), 0)
    assert await memory.refresh() == []
    await lose_everything(registry)
    assert await memory.refresh() == ["m"]
    assert dict(await registry.fleet.deployments()) == {"m": version(1)}
    revisions = await registry.connection.command("HKEYS", registry.keys.fleet.revisions)
    assert revisions == [f"m@{SPEC.revision()}".encode()]
    assert await memory.refresh() == []


async def test_the_later_version_holds(registry: Registry) -> None:
    """A process that was away for a change learns of it, and does not undo it."""
    old, new = Memory(registry.fleet), Memory(registry.fleet)
    assert await registry.fleet.declare("m", version(1), 0)
    await old.refresh()
    assert await registry.fleet.declare("m", version(2), 1)
    await new.refresh()
    await lose_everything(registry)
    assert await old.refresh() == ["m"]
    assert await new.refresh() == ["m"]
    assert await old.refresh() == []
    assert dict(await registry.fleet.deployments()) == {"m": version(2)}


async def test_what_was_deleted_stays_deleted(registry: Registry) -> None:
    """Who was away while a model was deleted does not declare it again; nor after a loss."""
    old, new = Memory(registry.fleet), Memory(registry.fleet)
    assert await registry.fleet.declare("m", version(1), 0)
    await old.refresh()
    await delete(registry, 2)
    assert await old.refresh() == []
    await new.refresh()
    await lose_everything(registry)
    assert await new.refresh() == []
    assert await old.refresh() == []
    assert not await registry.fleet.deployments()


async def test_one_who_missed_the_deletion_is_corrected(registry: Registry) -> None:
    """Brought back by the wrong memory, a deleted model is marked as deleted by the right one."""
    old, new = Memory(registry.fleet), Memory(registry.fleet)
    assert await registry.fleet.declare("m", version(1), 0)
    await old.refresh()
    await delete(registry, 2)
    await new.refresh()
    await lose_everything(registry)
    assert await old.refresh() == ["m"]
    assert await new.refresh() == ["m"]
    assert (await registry.fleet.deployments())["m"] == version(2, deleted=True)


async def test_an_agent_remembers_over_its_own_death(registry: Registry, tmp_path: Path) -> None:
    """The copy on disk declares again what Redis and every other process have lost."""
    assert await registry.fleet.declare("m", version(1), 0)
    await Remembering(tmp_path).refresh(registry)
    await lose_everything(registry)
    await Remembering(tmp_path).refresh(registry)
    assert dict(await registry.fleet.deployments()) == {"m": version(1)}


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"redis": "redis://elsewhere:1/0"}'])
async def test_a_copy_that_is_none_brings_nothing(
    registry: Registry, tmp_path: Path, content: bytes | None
) -> None:
    """An unreadable copy, and that of an agent that has left in good order, are no memory."""
    assert await registry.fleet.declare("m", version(1), 0)
    remembering = Remembering(tmp_path)
    await remembering.refresh(registry)
    if content is None:
        remembering.forget()
        await remembering.refresh(registry)
        assert not (tmp_path / NAME).exists()
    else:
        (tmp_path / NAME).write_bytes(content)
    await lose_everything(registry)
    await Remembering(tmp_path).refresh(registry)
    assert not await registry.fleet.deployments()


async def test_a_copy_of_another_fleet_brings_nothing(registry: Registry, tmp_path: Path) -> None:
    """An agent that was moved to another Redis or prefix leaves its old fleet behind."""
    assert await registry.fleet.declare("m", version(1), 0)
    await Remembering(tmp_path).refresh(registry)
    path = tmp_path / NAME
    shown = registry.connection.shown_url
    path.write_text(path.read_text().replace(shown, "redis://elsewhere:1/0"))
    await lose_everything(registry)
    await Remembering(tmp_path).refresh(registry)
    assert not await registry.fleet.deployments()


async def test_foreign_data_are_set_aside(registry: Registry) -> None:
    """A fleet key of another type is renamed, with an end; keys of the right type stay."""
    keys, command = registry.keys.fleet, registry.connection.command
    assert await registry.fleet.declare("m", version(1), 0)
    await command("SET", keys.hosts, "x")
    await command("RPUSH", keys.orders("h"), "y")
    assert await registry.fleet.quarantine() == [keys.hosts]
    assert await registry.fleet.set_aside(keys.orders("h"), "hash")
    assert not await registry.fleet.hosts()
    assert not await registry.fleet.orders("h")
    assert "m" in await registry.fleet.deployments()
    for key, content in ((keys.hosts, b"x"), (keys.orders("h"), None)):
        assert await command("TTL", keys.aside(key)) > 0
        assert content is None or await command("GET", keys.aside(key)) == content
        await command("DEL", keys.aside(key))
