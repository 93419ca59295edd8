"""The scripts compiled once, silence in the logs, and which seeds to try."""

import os

import pytest

from shared.registry.loader import ScriptLibrary
from tests.simulation.luahost import LuaHost


@pytest.fixture(autouse=True)
def quiet(quiet_logs: None) -> None:
    """Hundreds of failovers are logged by nobody."""


@pytest.fixture(scope="session")
def host() -> LuaHost:
    """Compile the scripts as they are in the tree."""
    return LuaHost(ScriptLibrary.load())


def seeds(count: int) -> range:
    """Give the seeds to try: SEED=n tries that one, SEEDS=n so many."""
    if "SEED" in os.environ:
        seed = int(os.environ["SEED"])
        return range(seed, seed + 1)
    return range(int(os.environ.get("SEEDS", count)))
