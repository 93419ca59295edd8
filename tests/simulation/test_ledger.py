"""The ledger is exact through every history: thousands of interleavings of load and faults.

`SEED=n pytest tests/simulation` replays one history exactly; `SEEDS=5000` tries so many.
"""

import os
import subprocess
import sys
import time

import pytest

from tests.simulation.conftest import clock_steps, seeds, told
from tests.simulation.ledgersim import LedgerSim
from tests.simulation.luahost import LuaHost

# Among the slow ones: they are measured in minutes, and coverage would double that.
pytestmark = pytest.mark.long

KNOWN_SEEDS = 40
FRESH_SEEDS = 20


@pytest.mark.timeout(36_000)
def test_the_ledger_is_exact_after_every_history(host: LuaHost) -> None:
    """Totals equal leases after each script; two beats after the last fault, the truth."""
    began_s, scripts, requests, faults = time.perf_counter(), 0, 0, 0
    steps_ms: list[float] = []
    tried = seeds(KNOWN_SEEDS, FRESH_SEEDS)
    for seed in tried:
        try:
            figures = LedgerSim(host, seed).run()
        except Exception as error:
            raise AssertionError(f"replay with SEED={seed}: {error}") from error
        scripts += figures.scripts
        requests += figures.requests
        faults += len(figures.faults)
        steps_ms += figures.clock_steps_ms
        if len(tried) == 1:
            print(figures)  # noqa: T201 - a replay is for a reader
    took_s = time.perf_counter() - began_s
    print(  # noqa: T201 - figures for the reader
        f"\nseeds {told(tried)}: {scripts} scripts checked, {requests} "
        f"requests, {faults} faults, {clock_steps(steps_ms)}, {len(tried) / took_s:.1f} seeds/s"
    )
    assert scripts > 100 * len(tried)


def test_a_seed_replays_exactly(host: LuaHost) -> None:
    """The same seed gives the same history, command by command, with its times and replies."""
    first, again = (LedgerSim(host, 7).run() for _ in range(2))
    assert first == again
    assert LedgerSim(host, 8).run().history != first.history


def test_a_seed_replays_exactly_in_another_process(host: LuaHost) -> None:
    """Nothing of a history depends on the process that lives through it."""
    program = (
        "from shared.registry.loader import ScriptLibrary\n"
        "from tests.simulation.ledgersim import LedgerSim\n"
        "from tests.simulation.luahost import LuaHost\n"
        "print('history', LedgerSim(LuaHost(ScriptLibrary.load()), 7).run().history)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert f"history {LedgerSim(host, 7).run().history}" in done.stdout
