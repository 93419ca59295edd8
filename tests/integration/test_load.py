"""A thousand users at once through two proxies, four engines and two cores, without one failure."""

from pathlib import Path
from statistics import median

import pytest

from tests.support.mesh import ready_replicas, sim_model, start, write_models
from tests.support.streams import Load
from tests.support.waiting import wait_until

MODEL = "sim"
RATE = 100.0
DURATION_S = 60.0
TOKENS = 40
STEP_MS = 250.0
"""With 40 tokens a stream lasts ten seconds: at 100 a second, a thousand are in flight."""


@pytest.mark.mesh
@pytest.mark.alone
@pytest.mark.timeout(240)
async def test_a_thousand_streaming_users_are_served_without_a_failure(tmp_path: Path) -> None:
    """100 requests a second for 60 s, 1,000 at once: no failure, no retry, no drift."""
    models = write_models(tmp_path / "models.json", sim_model(MODEL, replicas=4, step_ms=STEP_MS))
    with start(models) as mesh:
        async with mesh.registry() as registry:
            assert len(await ready_replicas(registry, MODEL)) == 4
            load = Load(mesh.ports, MODEL, max_tokens=TOKENS, compares=False)
            samples = await load.arrivals(RATE, DURATION_S)
            in_flight = samples[len(samples) // 4 :]
            report = load.report()
            print(  # noqa: T201 - figures for the reader
                f"\n{report}\nin flight: {min(in_flight)} to {max(in_flight)}, "
                f"median {median(in_flight):g}"
            )
            assert report.count == RATE * DURATION_S
            assert (report.ok, report.retried) == (report.count, 0), str(report)
            assert median(in_flight) >= 1000
            audit = await mesh.ask("audit")
            assert audit.code == 0, audit

            async def empty() -> bool:
                totals = await registry.ledger.totals(MODEL)
                return all(total.requests == 0 for total in totals.values())

            await wait_until(empty, what="no reservation is left")
