"""One run: a trace through a fleet under one policy, and what its clients saw."""

from collections.abc import Sequence
from random import Random
from typing import Final

import msgspec

from tests.routing.contenders import Contender, Make, Setting
from tests.routing.fleet import (
    PREFILL_US_PER_TOKEN,
    Job,
    Replica,
    Timeline,
)
from tests.routing.traces import Arrival
from tests.simulation.luahost import LuaHost

WARM_SHARE: Final = 0.1
"""The first tenth of a trace meets cold caches, and is not counted."""
SLO_TTFT_S: Final = 1.0
SLO_STRETCH: Final = 2.0
"""The first token is due after a second and twice the time that the whole prompt takes alone."""
SLO_REST_S: Final = 0.5
SLO_TPOT_S: Final = 0.1
"""The rest is due after half a second (long steps of others' prompts) and this for each token."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet and how hard it is driven."""

    speeds: tuple[float, ...]
    proxies: int = 4
    speeds_known: bool = True
    """Whether records say how fast a replica is."""
    stretch: float = 1.0
    """Time between arrivals, against the trace's."""
    seed: int = 1


def speeds_of(replicas: int) -> tuple[float, ...]:
    """Make a mixed fleet: a quarter half as fast as the others, a quarter twice as fast."""
    quarter = replicas // 4
    return (0.5,) * quarter + (1.0,) * (replicas - 2 * quarter) + (2.0,) * quarter


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    ttft_mean_s: float
    tpot_p99_s: float
    goodput: float
    """Share of requests that met both SLOs."""
    hit_rate: float
    """Share of prompt tokens that the replicas had."""
    imbalance: float
    """Queued prompt tokens: the longest queue in seconds by the mean queue, mean over arrivals."""
    rate_per_s: float
    """Requests that ended per second, between the first tenth and the last."""
    worked_s: float


def simulate(arrivals: Sequence[Arrival], scenario: Scenario, make: Make, host: LuaHost) -> Outcome:
    """Drive the whole trace through the fleet."""
    timeline = Timeline()
    random = Random(scenario.seed)
    rids = [f"r{number:02d}" for number in range(len(scenario.speeds))]
    speeds = dict(zip(rids, scenario.speeds, strict=True))
    known = speeds if scenario.speeds_known else dict.fromkeys(rids, 1.0)
    contender: Contender = make(Setting(timeline, host, known, scenario.proxies, random))
    jobs: list[Job] = []
    imbalances: list[float] = []

    replicas = {rid: Replica(rid, speed, timeline, contender) for rid, speed in speeds.items()}
    proxies = Random(scenario.seed + 1)

    def arrive(at: int) -> None:
        arrival = arrivals[at]
        job = Job(at, arrival, proxies.randrange(scenario.proxies), timeline.now_s)
        jobs.append(job)
        waits = [replica.backlog_tokens / replica.speed for replica in replicas.values()]
        if any(waits):
            imbalances.append(max(waits) * len(waits) / sum(waits))
        job.rid = contender.choose(job)
        replicas[job.rid].send(job)
        if at + 1 < len(arrivals):
            timeline.at(arrivals[at + 1].at_s * scenario.stretch, lambda: arrive(at + 1))

    timeline.at(0.0, lambda: arrive(0))
    timeline.run()
    return _outcome(jobs, list(replicas.values()), imbalances)


def _outcome(jobs: list[Job], replicas: list[Replica], imbalances: list[float]) -> Outcome:
    counted = jobs[int(len(jobs) * WARM_SHARE) :]
    waits = sorted(job.first_s - job.sent_s for job in counted)
    good = sum(map(_good, counted))
    ends = sorted(job.ended_s for job in jobs)
    low, high = int(len(ends) * 0.1), int(len(ends) * 0.9)
    return Outcome(
        requests=len(counted),
        ttft_p50_s=_quantile(waits, 0.5),
        ttft_p99_s=_quantile(waits, 0.99),
        ttft_mean_s=sum(waits) / len(waits),
        tpot_p99_s=_quantile(sorted(map(_tpot_s, counted)), 0.99),
        goodput=good / len(counted),
        hit_rate=sum(job.held_tokens for job in counted)
        / sum(job.arrival.input_tokens for job in counted),
        imbalance=sum(imbalances) / max(1, len(imbalances)),
        rate_per_s=(high - low) / max(1e-9, ends[high] - ends[low]),
        worked_s=sum(replica.worked_s for replica in replicas),
    )


def _good(job: Job) -> bool:
    alone_s = job.arrival.input_tokens * PREFILL_US_PER_TOKEN * 1e-6
    due_s = SLO_TTFT_S + SLO_STRETCH * alone_s
    rest_s = SLO_REST_S + SLO_TPOT_S * job.arrival.output_tokens
    return job.first_s - job.sent_s <= due_s and job.ended_s - job.first_s <= rest_s


def _tpot_s(job: Job) -> float:
    return (job.ended_s - job.first_s) / max(1, job.arrival.output_tokens - 1)


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
