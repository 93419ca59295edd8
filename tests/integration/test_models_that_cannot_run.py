"""Models that cannot run here: the reason reaches the operator, and other models notice nothing."""

import json
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import pytest
import pytest_asyncio

from shared.registry import Registry
from tests.support.mesh import Mesh, ready_replicas, sim_model, start, write_models
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mesh

GOOD = "good"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Generator[Mesh]:
    """Run a mesh that serves one good model, on a host without an engine environment."""
    models = write_models(tmp_path_factory.mktemp("models") / "models.json", sim_model(GOOD))
    nowhere = {"REDMESH_ENGINE_PYTHON": "/nonexistent/python"}
    with start(models, proxies=1, controllers=1, env=nowhere) as running:
        yield running


@pytest_asyncio.fixture
async def registry(mesh: Mesh) -> AsyncGenerator[Registry]:
    """Open the registry; the good model must be the same before and after."""
    async with mesh.registry() as opened:
        before = await ready_replicas(opened, GOOD)
        yield opened
        assert await ready_replicas(opened, GOOD) == before
        assert len(before) == 1


async def told(registry: Registry, model: str, *words: str) -> None:
    """Wait until an event about `model` holds all of `words`."""

    async def found() -> bool:
        return any(
            model in event.subject and all(word in event.message for word in words)
            for event in await registry.fleet.events(200)
        )

    await wait_until(found, timeout_s=20, what=f"an event about {model} says {words}")


async def forget(mesh: Mesh, registry: Registry, model: str) -> None:
    """Delete a deployment and wait until nothing of it is left."""
    done = await mesh.ask("delete", model)
    assert done.code == 0, done

    async def forgotten() -> bool:
        return model not in await registry.fleet.deployments()

    await wait_until(forgotten, timeout_s=20, what=f"{model} is forgotten")


async def test_a_refused_models_file_changes_nothing(
    mesh: Mesh, registry: Registry, tmp_path: Path
) -> None:
    """With one mistake in a file of several models, none of them is applied."""
    before = await registry.fleet.deployments()
    path = tmp_path / "models.json"
    models = [sim_model("fresh"), sim_model(GOOD, replicas=3), sim_model("bad name")]
    path.write_text(json.dumps({"models": models}))
    done = await mesh.ask("apply", "-f", path)
    assert done.code == 2, done
    assert "models[2].name" in done.err, done
    assert await registry.fleet.deployments() == before


async def test_a_name_that_is_taken_is_refused(
    mesh: Mesh, registry: Registry, tmp_path: Path
) -> None:
    """An alias that belongs to another deployment is refused, and its owner is named."""
    models = write_models(tmp_path / "models.json", sim_model("thief", aliases=[GOOD]))
    done = await mesh.ask("apply", "-f", models)
    assert done.code == 2, done
    assert "thief" in done.err, done
    assert GOOD in done.err, done
    assert "thief" not in await registry.fleet.deployments()


async def test_a_host_without_an_engine_environment_is_told(
    mesh: Mesh, registry: Registry, tmp_path: Path
) -> None:
    """A vLLM model on hosts that have no vLLM waits, and an event says what is missing."""
    (tmp_path / "weights").mkdir()
    models = write_models(
        tmp_path / "models.json", {"name": "real", "engine": {"model": "./weights"}}
    )
    done = await mesh.ask("apply", "-f", models)
    assert done.code == 0, done
    await told(registry, "real", "vllm")
    await forget(mesh, registry, "real")


async def test_a_template_that_has_gone_is_told(
    mesh: Mesh, registry: Registry, tmp_path: Path
) -> None:
    """A file that was there when it was declared and is gone when it is needed: events name it."""
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    model = sim_model("gone", replicas=0)
    model["engine"]["chat_template"] = str(template)
    done = await mesh.ask("apply", "-f", write_models(tmp_path / "models.json", model))
    assert done.code == 0, done
    template.unlink()
    done = await mesh.ask("scale", "gone", "1")
    assert done.code == 0, done
    await told(registry, "gone", "chat.jinja")
    await forget(mesh, registry, "gone")
