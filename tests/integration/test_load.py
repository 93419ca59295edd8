"""A thousand users at once through two proxies, four engines and two cores: with Redis and without.

The load alone is as much as the machine can do. What the absence of Redis adds to a request can be
told all the same, and is measured in three ways, for a while before and for as long as it lasts:

- The proxies' own clock, from asking for a replica to having one. Nothing else of a request's way
  depends on Redis, so this is what its absence adds. A healthy choice takes a round trip.
- The first byte of a model whose engine answers at once, asked ten times a second beside the load:
  what remains is the way through the busy mesh. Its median is steady.
- The first byte of the load itself. Its median is a matter of the engines: a request waits for the
  end of a step of 250 ms, and how arrivals and steps fall together drifts by tens of milliseconds
  with nothing else changed. So it is printed, and its slowest hundredth is held to less than they
  would lose if they waited for Redis.
"""

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import httpx
import msgspec
import pytest

from services.cli.redisserver import is_free
from services.proxy.reservations import RESERVE_DEADLINE_S
from shared.registry import Registry
from tests.support.mesh import ready_replicas, sim_model, start, write_models
from tests.support.redis_topologies import Server
from tests.support.redis_trial import ADDED_BOUND_S, Choices, Trial
from tests.support.streams import Load, percentile
from tests.support.waiting import wait_until

MODEL: Final = "sim"
RATE: Final = 100.0
TOKENS: Final = 40
STEP_MS: Final = 250.0
"""With 40 tokens a stream lasts ten seconds: at 100 a second, a thousand are in flight."""
PROBE: Final = "probe"
PROBE_RATE: Final = 10.0
PROBE_STEP_MS: Final = 1.0
RAMP_S: Final = 15.0
"""Until as many are in flight as ever will be."""
HEALTHY_S: Final = 45.0
AWAY_S: Final = float(os.environ.get("REDMESH_TEST_AWAY_S", "60"))
"""How long Redis stays away."""
AFTER_S: Final = 10.0
"""How long requests still arrive when it is back."""
BACK_BOUND_S: Final = 4.0
"""From Redis' return until every proxy reserves in it again."""
TAIL_BOUND_S: Final = RESERVE_DEADLINE_S / 2
"""What the slowest hundredth may lose. If they waited for Redis, it would be twice that; on this
machine they differ by up to 20 ms from one minute to the next."""


class Span(msgspec.Struct, frozen=True):
    """A part of the load."""

    began_s: float
    ended_s: float
    choices: Choices

    def ttft_s(self, load: Load) -> Sequence[float]:
        """Give the times to the first byte of what was asked meanwhile, sorted."""
        return sorted(
            result.ttft_s
            for result in load.results
            if self.began_s <= result.ended_s - result.total_s < self.ended_s
        )


async def span(trial: Trial, duration_s: float) -> Span:
    """Let the load go on."""
    before, began_s = await trial.choices(), time.monotonic()
    await asyncio.sleep(duration_s)  # the duration is what is tested
    return Span(began_s, time.monotonic(), (await trial.choices()).since(before))


def shown(ttft_s: Sequence[float]) -> str:
    """Show percentiles."""
    return ", ".join(f"p{p} {percentile(ttft_s, p) * 1e3:.1f} ms" for p in (50, 90, 99))


async def empty(registry: Registry) -> bool:
    """Tell whether no reservation is left."""
    totals = [await registry.ledger.totals(model) for model in (MODEL, PROBE)]
    return all(each.requests == 0 for models in totals for each in models.values())


@pytest.mark.mesh
@pytest.mark.alone
@pytest.mark.timeout(300)
async def test_a_thousand_streaming_users_do_not_notice_that_redis_is_away(tmp_path: Path) -> None:
    """100 requests a second, a minute with Redis and one without: none fails, none waits."""
    models = write_models(
        tmp_path / "models.json",
        sim_model(MODEL, replicas=4, step_ms=STEP_MS),
        sim_model(PROBE, step_ms=PROBE_STEP_MS),
    )
    with (
        Server(tmp_path / "redis", "--appendonly", "yes") as redis,
        start(models, env={"REDMESH_REDIS_URL": redis.url}) as mesh,
    ):
        load = Load(mesh.ports, MODEL, max_tokens=TOKENS, compares=False)
        probe = Load(mesh.ports, PROBE, max_tokens=1, compares=False)
        async with mesh.registry() as registry, httpx.AsyncClient(timeout=10) as http:
            assert len(await ready_replicas(registry, MODEL)) == 4
            trial = Trial(mesh, MODEL, load, http)
            async with asyncio.TaskGroup() as group:
                lasts_s = RAMP_S + HEALTHY_S + AWAY_S + AFTER_S
                arriving = group.create_task(load.arrivals(RATE, lasts_s))
                group.create_task(probe.arrivals(PROBE_RATE, lasts_s))
                await asyncio.sleep(RAMP_S)  # arrivals have their times
                with_redis = await span(trial, HEALTHY_S)
                await asyncio.to_thread(redis.kill)
                assert is_free(redis.port)
                await trial.goes_away()
                without = await span(trial, AWAY_S)
                assert is_free(redis.port)
                await asyncio.to_thread(redis.start)
                await trial.is_back()
                await trial.heals(ledger_bound_s=BACK_BOUND_S)
            in_flight = arriving.result()[round(RAMP_S) * 4 :]
            trial.figures["in flight"] = f"{min(in_flight)} to {max(in_flight)}"
            judge(trial, probe, with_redis, without)
            assert load.report().count == RATE * lasts_s
            assert min(in_flight) >= 1000, sorted(in_flight)[:9]
            audit = await mesh.ask("audit")
            assert audit.code == 0, audit
            await wait_until(lambda: empty(registry), what="no reservation is left")


def judge(trial: Trial, probe: Load, with_redis: Span, without: Span) -> None:
    """Print what Redis' absence changed, and hold it to the bounds."""
    for name, each in (("with Redis", with_redis), ("without", without)):
        choices = each.choices
        trial.figures[f"\n{name}: choice"] = (
            f"{choices.mean_s * 1e6:.0f} µs, {choices.late:.0f} of {choices.count:.0f} above 1 ms, "
            f"TTFT {shown(each.ttft_s(trial.load))}; of the probe {shown(each.ttft_s(probe))}"
        )
    trial.judge("Redis away under full load")
    report = probe.report()
    assert (report.ok, report.retried) == (report.count, 0), report
    choices = without.choices
    assert choices.local == choices.count > 0.9 * RATE * AWAY_S
    assert choices.mean_s < ADDED_BOUND_S
    assert choices.late <= choices.count / 100
    for asked, percent, added_s in (
        (probe, 50, ADDED_BOUND_S),
        (probe, 99, TAIL_BOUND_S),
        (trial.load, 99, TAIL_BOUND_S),
    ):
        limit_s = percentile(with_redis.ttft_s(asked), percent) + added_s
        assert percentile(without.ttft_s(asked), percent) <= limit_s, percent
