"""The wheel: an application whose top-level names are `services` and `shared`."""

import importlib.metadata
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Build the wheel and return the names in it."""
    out = tmp_path_factory.mktemp("wheel")
    own = REPOSITORY / ".tools" / "bin" / "uv"
    uv = str(own) if own.exists() else shutil.which("uv")
    assert uv is not None, "uv is missing: run `make setup`"
    built = subprocess.run(
        [uv, "build", "--wheel", "--quiet", "--out-dir", str(out), str(REPOSITORY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = out.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_every_module(wheel_files: set[str]) -> None:
    """Each Python file of `services` and `shared` is in the wheel."""
    modules = {
        str(path.relative_to(REPOSITORY))
        for top in ("services", "shared")
        for path in (REPOSITORY / top).rglob("*.py")
    }
    assert modules
    assert modules <= wheel_files


def test_the_wheel_holds_every_script(wheel_files: set[str]) -> None:
    """Each Lua file is in the wheel below `shared/_lua`, where the loader looks for it."""
    scripts = {
        f"shared/_lua/{path.relative_to(REPOSITORY / 'lua')}"
        for path in (REPOSITORY / "lua").rglob("*.lua")
    }
    assert scripts
    assert scripts <= wheel_files


def test_the_wheel_holds_the_schema_of_models_files(wheel_files: set[str]) -> None:
    """The JSON Schema that `redmesh apply` checks models files with is in the wheel."""
    assert "shared/models/deployments.schema.json" in wheel_files


def test_the_wheel_holds_nothing_else(wheel_files: set[str]) -> None:
    """Tests, weights and deployment files stay out of the wheel."""
    tops = {name.split("/")[0] for name in wheel_files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"services", "shared"}


@pytest.mark.parametrize("name", ["services", "shared"])
def test_nobody_else_provides_our_names(name: str) -> None:
    """No other installed distribution has a top-level package of our name: it might hide ours."""
    providers = set(importlib.metadata.packages_distributions().get(name, []))
    files_of_others = {
        distribution.metadata["Name"]
        for distribution in importlib.metadata.distributions()
        if distribution.metadata["Name"] != "redmesh"
        and any(file.parts[0] == name for file in distribution.files or [])
    }
    assert providers | files_of_others <= {"redmesh"}
