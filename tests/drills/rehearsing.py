"""What every test of drills does: run one as an operator runs it, and read its report.

The drills judge strictly (every stream whole and of the right text, no reservation left, no drift),
so a test asks only for exit code 0, and that the reports say what was seen.
"""

import json
from pathlib import Path
from typing import Any, Final

from services.cli.drill.catalogue import DRILLS
from tests.support.mesh import Mesh

LOAD: Final = "users=6,tokens=40"
OF_COORDINATION: Final = tuple(name for name in DRILLS if name.startswith(("redis-", "partition-")))
"""Drills that hit Redis, or the way to something."""
OF_PROCESSES: Final = tuple(name for name in DRILLS if name not in OF_COORDINATION)
"""All others. Either part has a file and a mesh of its own, so that they run side by side."""


async def rehearse(mesh: Mesh, name: str, out: Path, *options: str) -> dict[str, Any]:
    """Run a drill, print what it printed, and return its report; it must have passed."""
    command = ("drill", "run", name, "--load", LOAD, "--out", out, *options)
    done = await mesh.ask(*command, timeout_s=170)
    print(f"\n{done.out}")  # noqa: T201 - figures for the reader
    assert done.code == 0, done
    return json.loads((out / "report.json").read_bytes())


async def keeps_its_budget(mesh: Mesh, name: str, out: Path) -> None:
    """Assert that a drill passes, and that its three reports agree on that."""
    report = await rehearse(mesh, name, out)
    assert report["verdict"]["passed"]
    assert report["seen"]["traffic"]["compared"]
    assert (out / "report.txt").read_text().startswith(f"Drill {name}: PASSED")
    page = (out / "report.html").read_text()
    assert "PASSED" in page
    assert "<svg" in page
    assert "http" not in page.replace("http://127.0.0", ""), "it needs nothing from elsewhere"
