"""At most one leader's writes are accepted, through every history of the leader protocol.

`SEED=n pytest tests/simulation` replays one history exactly; `SEEDS=5000` tries so many.
"""

import time

import pytest

from tests.simulation.conftest import clock_steps, seeds, told
from tests.simulation.leadersim import LeaderSim
from tests.simulation.luahost import LuaHost

# Among the slow ones: they are measured in minutes, and coverage would double that.
pytestmark = pytest.mark.long

KNOWN_SEEDS = 30
FRESH_SEEDS = 15


@pytest.mark.timeout(36_000)
def test_one_leader_writes_in_every_history(host: LuaHost) -> None:
    """Old leaders are refused, epochs are unique, and in the end what is wanted runs."""
    began_s, scripts, elections = time.perf_counter(), 0, 0
    steps_ms: list[float] = []
    tried = seeds(KNOWN_SEEDS, FRESH_SEEDS)
    for seed in tried:
        try:
            sim = LeaderSim(host, seed).run()
        except Exception as error:
            raise AssertionError(f"replay with SEED={seed}: {error}") from error
        scripts += sim.redis.executions
        elections += sim.elections
        steps_ms += sim.redis.clock_steps_ms
        if len(tried) == 1:
            print(seed, sim.kind, sim.faults)  # noqa: T201 - a replay is for a reader
    took_s = time.perf_counter() - began_s
    print(  # noqa: T201 - figures for the reader
        f"\nseeds {told(tried)}: {scripts} scripts checked, {elections} "
        f"elections, {clock_steps(steps_ms)}, {len(tried) / took_s:.1f} seeds/s"
    )
    assert elections >= len(tried)


def test_a_seed_replays_exactly(host: LuaHost) -> None:
    """The same seed gives the same history."""
    first, again = (LeaderSim(host, 3).run().redis.history.hexdigest() for _ in range(2))
    assert first == again
