"""The scripts compiled once, silence in the logs, and which seeds to try."""

import logging
import os
from collections.abc import Generator

import pytest
import structlog

from shared.registry.loader import ScriptLibrary
from tests.simulation.luahost import LuaHost


@pytest.fixture(autouse=True)
def quiet() -> Generator[None]:
    """Hundreds of failovers are logged by nobody."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


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
