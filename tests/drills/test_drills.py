"""Drills that hit processes, each on real ones, as an operator runs it: budgets are kept."""

from pathlib import Path

import pytest

from tests.drills.rehearsing import LOAD, OF_PROCESSES, keeps_its_budget, rehearse
from tests.support.mesh import Mesh

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(180)]


@pytest.mark.parametrize("name", OF_PROCESSES)
async def test_every_drill_keeps_its_budget(mesh: Mesh, tmp_path: Path, name: str) -> None:
    """The drill passes on a mesh of real processes, and its three reports agree on that."""
    await keeps_its_budget(mesh, name, tmp_path)


async def test_an_agent_that_permits_drills_strikes_its_own_engine(
    mesh: Mesh, tmp_path: Path
) -> None:
    """Where no process is within reach, the wish reaches the engine through Redis and agent."""
    report = await rehearse(mesh, "replica-kill", tmp_path, "--via", "agent")
    kinds = {mark["text"].split()[0] for mark in report["marks"] if mark["kind"] == "event"}
    assert "DrillStruck" in kinds


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
