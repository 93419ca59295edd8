"""Every drill on real processes, as an operator runs it: each keeps its budget, and prints it.

The drills judge strictly (every stream whole and of the right text, no reservation left, no drift),
so a test asks only for exit code 0, and that the reports say what was seen.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from services.cli.drill.catalogue import DRILLS
from tests.support.mesh import Mesh

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(180)]

LOAD = "users=6,tokens=40"


async def rehearse(mesh: Mesh, name: str, out: Path, *options: str) -> dict[str, Any]:
    """Run a drill, print what it printed, and return its report; it must have passed."""
    command = ("drill", "run", name, "--load", LOAD, "--out", out, *options)
    done = await mesh.ask(*command, timeout_s=170)
    print(f"\n{done.out}")  # noqa: T201 - figures for the reader
    assert done.code == 0, f"{done}\n{mesh.logs()}"
    return json.loads((out / "report.json").read_bytes())


@pytest.mark.parametrize("name", DRILLS)
async def test_every_drill_keeps_its_budget(mesh: Mesh, tmp_path: Path, name: str) -> None:
    """The drill passes on a mesh of real processes, and its three reports agree on that."""
    report = await rehearse(mesh, name, tmp_path)
    assert report["verdict"]["passed"]
    assert report["seen"]["traffic"]["compared"]
    assert (tmp_path / "report.txt").read_text().startswith(f"Drill {name}: PASSED")
    page = (tmp_path / "report.html").read_text()
    assert "PASSED" in page
    assert "<svg" in page
    assert "http" not in page.replace("http://127.0.0", ""), "it needs nothing from elsewhere"


async def test_an_agent_that_permits_drills_strikes_its_own_engine(
    mesh: Mesh, tmp_path: Path
) -> None:
    """Where no process is within reach, the wish reaches the engine through Redis and agent."""
    report = await rehearse(mesh, "replica-kill", tmp_path, "--via", "agent")
    kinds = {mark["text"].split()[0] for mark in report["marks"] if mark["kind"] == "event"}
    assert "DrillStruck" in kinds


async def test_redis_away_by_its_own_command(mesh: Mesh, tmp_path: Path) -> None:
    """CLIENT PAUSE makes Redis answer nobody, without a hand on its process."""
    await rehearse(mesh, "redis-away", tmp_path, "--via", "redis", "--hold", "4")


async def test_a_missed_budget_is_exit_code_1(mesh: Mesh, tmp_path: Path) -> None:
    """A bound that cannot be kept is told as missed, with what was seen."""
    done = await mesh.ask(
        *("drill", "run", "controller-failover", "--budget", "recover_s=0.01"),
        *("--load", LOAD, "--out", tmp_path),
        timeout_s=170,
    )
    assert done.code == 1, done
    assert "MISSED" in done.out
    assert "BUDGET MISSED" in (tmp_path / "report.html").read_text()


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
