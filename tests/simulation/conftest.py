"""The scripts compiled once, silence in the logs, and which seeds to try."""

import os
import secrets
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest

from shared.registry.loader import ScriptLibrary
from tests.simulation.faults import HOUR_MS
from tests.simulation.luahost import LuaHost

_FRESH: Final = 1_000_000
"""Where the seeds that follow from a commit begin: beyond all that anybody asks for by SEEDS."""


@pytest.fixture(autouse=True)
def quiet(quiet_logs: None) -> None:
    """Hundreds of failovers are logged by nobody."""


@pytest.fixture(scope="session")
def host() -> LuaHost:
    """Compile the scripts as they are in the tree."""
    return LuaHost(ScriptLibrary.load())


def seeds(known: int, fresh: int) -> list[int]:
    """Give the seeds to try: SEED=n tries that one, SEEDS=n so many.

    Else the first `known` ones, and `fresh` ones that follow from the commit, so that each change
    is tried with histories that nobody has seen, and again with the same ones if it is run again.
    """
    if "SEED" in os.environ:
        return [int(os.environ["SEED"])]
    if "SEEDS" in os.environ:
        return list(range(int(os.environ["SEEDS"])))
    first = _FRESH + int(_commit()[:8], 16)
    return [*range(known), *range(first, first + fresh)]


def told(tried: list[int]) -> str:
    """Name the seeds for a reader."""
    breaks = [at for at in range(1, len(tried)) if tried[at] != tried[at - 1] + 1]
    edges = [0, *breaks, len(tried)]
    return ", ".join(f"{tried[a]} to {tried[b - 1]}" for a, b in pairwise(edges))


def clock_steps(steps_ms: Sequence[float]) -> str:
    """Say how often Redis' clock was set, each way, and how often by an hour."""
    ahead, back = ([by for by in steps_ms if (by > 0) is forward] for forward in (True, False))
    return ", ".join(
        f"clock set {where} {len(each)} times ({sum(abs(by) >= HOUR_MS for by in each)} by an hour)"
        for where, each in (("ahead", ahead), ("back", back))
    )


def _commit() -> str:
    """Name the commit that is checked out; without one, something new each time."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"],  # noqa: S607 - git as installed
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return git.stdout.strip() or secrets.token_hex(20)
