"""Drills that hit Redis or a way through the network, as an operator runs them."""

from pathlib import Path

import pytest

from tests.drills.rehearsing import OF_COORDINATION, keeps_its_budget, rehearse
from tests.support.mesh import Mesh

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(180)]


@pytest.mark.parametrize("name", OF_COORDINATION)
async def test_every_drill_keeps_its_budget(mesh: Mesh, tmp_path: Path, name: str) -> None:
    """The drill passes on a mesh of real processes, and its three reports agree on that."""
    await keeps_its_budget(mesh, name, tmp_path)


async def test_redis_away_by_its_own_command(mesh: Mesh, tmp_path: Path) -> None:
    """CLIENT PAUSE makes Redis answer nobody, without a hand on its process."""
    await rehearse(mesh, "redis-away", tmp_path, "--via", "redis", "--hold", "4")


async def test_production_asks_twice(mesh: Mesh, tmp_path: Path) -> None:
    """On a fleet marked as production a drill does nothing without --yes, and says why."""
    assert (await mesh.ask("production", "on", "--note", "paying users")).code == 0
    try:
        done = await mesh.ask("drill", "run", "redis-disconnect", "--out", tmp_path)
        assert done.code == 2, done
        assert "paying users" in done.err
        assert "--yes" in done.err
        assert not (tmp_path / "report.json").exists()
        await rehearse(mesh, "redis-disconnect", tmp_path / "yes", "--yes")
    finally:
        assert (await mesh.ask("production", "off")).code == 0
