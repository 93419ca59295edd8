"""Proof that the simulation can fail: errors made on purpose are found within a few histories."""

from pathlib import Path

import pytest

from tests.simulation.leadersim import LeaderSim
from tests.simulation.ledgersim import LedgerSim
from tests.simulation.luahost import LuaHost
from tests.simulation.mutations import LEADER, LEDGER, mutated

# Among the slow ones: they are measured in minutes, and coverage would double that.
pytestmark = pytest.mark.long

HISTORIES = 25


@pytest.mark.parametrize("name", LEDGER)
def test_errors_of_the_ledger_are_found(name: str, tmp_path: Path) -> None:
    """This error in a script or in the proxy breaks an invariant of the ledger."""
    with mutated(LEDGER[name], tmp_path) as library:
        host = LuaHost(library)
        first = LEDGER[name].seed
        for seed in range(first, first + HISTORIES):
            try:
                LedgerSim(host, seed, LEDGER[name].theme).run()
            except Exception as error:  # noqa: BLE001 - an error may also show as an exception
                print(f"\nseed {seed}: {error}")  # noqa: T201 - how it was found
                return
    pytest.fail(f"{HISTORIES} histories passed")


@pytest.mark.parametrize("name", LEADER)
def test_errors_of_the_leader_are_found(name: str, tmp_path: Path) -> None:
    """This error in a script or in the controller breaks an invariant of the leader protocol."""
    with mutated(LEADER[name], tmp_path) as library:
        host = LuaHost(library)
        first = LEADER[name].seed
        for seed in range(first, first + HISTORIES):
            try:
                LeaderSim(host, seed).run()
            except Exception as error:  # noqa: BLE001 - an error may also show as an exception
                print(f"\nseed {seed}: {error}")  # noqa: T201 - how it was found
                return
    pytest.fail(f"{HISTORIES} histories passed")
