"""One mesh on real vLLM for all end-to-end tests: an engine costs 2 GB and half a minute."""

import json
import os
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.support.mesh import ROOT, Mesh, start

FAQ = ROOT / "deploy" / "models" / "demo" / "faq.json"


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """Find the Python of the engine environment; without one these tests prove nothing."""
    path = Path(os.environ.get("REDMESH_ENGINE_PYTHON", ROOT / ".engine" / "bin" / "python"))
    if not path.exists():
        pytest.fail(f"{path} does not exist: run `make engine`", pytrace=False)
    return path


@pytest.fixture(scope="session")
def mesh(engine_python: Path) -> Generator[Mesh]:
    """Serve the demo model on two replicas of real vLLM behind two proxies."""
    with start(
        ROOT / "deploy" / "models" / "demo.json",
        engine="vllm",
        env={"REDMESH_ENGINE_PYTHON": str(engine_python)},
        timeout_s=300,
    ) as running:
        yield running


@pytest.fixture(scope="session")
def checkpoints(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make tiny checkpoints with random weights, one for each architecture that we ship."""
    folder = tmp_path_factory.mktemp("checkpoints")
    script = ROOT / "tests" / "support" / "checkpoints.py"
    subprocess.run([engine_python, script, folder], check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture(scope="session")
def faq() -> dict[str, str]:
    """Question → the answer that the demo model knows by heart."""
    entries: list[dict[str, Any]] = json.loads(FAQ.read_text())
    return {question: entry["answer"] for entry in entries for question in entry["questions"]}
