"""The Makefile: what a newcomer sees first."""

import os
import re
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Final

import pytest
from _pytest.mark.expression import Expression

REPOSITORY = Path(__file__).resolve().parents[3]
MAKEFILE = (REPOSITORY / "Makefile").read_text()
MARKS: Final = ("engine", "mesh", "timed", "alone", "long")
MARKED: Final = [
    found[1] or found[2]
    for found in re.finditer(r"^\t.* -m (?:\"(.+?)\"|([a-z]+) )", MAKEFILE, re.MULTILINE)
]
"""Which tests each run takes."""


def make(*words: str) -> str:
    """Run make on the repository and return what it prints, whatever make runs these tests."""
    inherited = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ENGINE", "MODELS", "UP"}
    done = subprocess.run(
        ["make", "-C", str(REPOSITORY), "--no-print-directory", *words],  # noqa: S607 - as users do
        env={name: value for name, value in os.environ.items() if name not in inherited},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_make_alone_prints_every_target() -> None:
    """`make` alone prints each phony target with a sentence of help."""
    targets = re.findall(r"^\.PHONY: (\S+)$", MAKEFILE, re.MULTILINE)
    printed = make()
    assert len(targets) > 10
    for target in targets:
        assert re.search(rf"^  make {target} +\w.+$", printed, re.MULTILINE), target


def test_a_simulated_demo_installs_no_engine() -> None:
    """`make demo ENGINE=sim` starts the mesh without installing vLLM."""
    printed = make("--dry-run", "demo", "ENGINE=sim")
    assert "deploy/engine/install.py" not in printed
    assert "redmesh up --models deploy/models/demo.json --engine sim" in printed


def test_the_demo_installs_the_engine_first() -> None:
    """`make demo` installs vLLM and then starts the mesh, with whatever models are asked for."""
    printed = make("--dry-run", "demo", "MODELS=mine.json")
    assert printed.index("deploy/engine/install.py") < printed.index("redmesh up")
    assert "redmesh up --models mine.json --engine auto" in printed


def test_ci_runs_make_test() -> None:
    """CI runs the README's `make test` and nothing beside it; that installs, lints and tests."""
    ci = (REPOSITORY / ".ci" / "run").read_text()
    assert re.findall(r"^make .*$", ci, re.MULTILINE) == ["make test"]
    printed = make("--dry-run", "test")
    for step in ("uv.sh", "system.sh tests", "install.py", "pyright", "luacheck", *MARKED):
        assert step in printed, step


@pytest.mark.parametrize(
    "marks", [each for n in range(len(MARKS) + 1) for each in combinations(MARKS, n)], ids="+".join
)
def test_every_test_is_run_once(marks: tuple[str, ...]) -> None:
    """Whatever a test is marked with, exactly one of the runs takes it."""
    takes = [Expression.compile(each).evaluate(lambda name, **_: name in marks) for each in MARKED]
    assert takes.count(True) == 1
