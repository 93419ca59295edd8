"""Partitions between real hosts under load: silent, one way and both ways, and links that are bad.

Where coordination is cut off, no request may notice. Where a replica is cut off from a proxy,
requests and streams may lose the time it takes to notice, and nothing else. Within ten seconds of
healing everybody agrees again.
"""

import asyncio
import time
from collections.abc import Generator
from typing import Final

import pytest

from services.cli.observing import leader_of
from shared.models.event import Event
from shared.registry import Registry
from tests.partitions.fleet import (
    HOSTS,
    MODEL,
    PROXIES,
    REPLICAS,
    STEP_MS,
    Fleet,
    leading,
    reports_of,
    whole,
)
from tests.partitions.trial import TOKENS, USERS, Trial, under_load
from tests.support.mesh import ready_replicas
from tests.support.netns import Network, Pairs
from tests.support.streams import Report, percentile
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mesh

LEASE_TTL_S: Final = 5.0
STREAM_S: Final = TOKENS * STEP_MS / 1000
WAITED_S: Final = 7.0
"""What an unreachable replica costs a request that has not arrived there."""
SLOWED: Final = 400
"""Requests before and after a replica becomes slow: of fewer, a 99th percentile says little."""
NOTICED_S: Final = {"both ways": 7.0, "there": 18.0, "back": 7.0}
"""When a request notices whose answer is on its way. Where the replica is still heard, each
retransmission of what it believes lost is a sign of life, and the pauses between them double: all
that are shorter than six seconds are less than twelve together, and the next one is long enough.
On an idle machine, where the first pause is a fifth of a second, that is after 12.8 s."""


@pytest.fixture(scope="module")
def fleet(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Generator[Fleet]:
    """Run one mesh for all tests of this file: it has to survive them all."""
    with Network(HOSTS) as network:
        made = Fleet(network, tmp_path_factory.mktemp("fleet"))
        with made.running():
            yield made


def directions(one: str, other: str) -> dict[str, Pairs]:
    """Give the three ways to cut a link."""
    there, back = (one, other), (other, one)
    return {"both ways": (there, back), "there": (there,), "back": (back,)}


async def test_a_proxy_that_is_cut_off_from_redis_serves_and_catches_up(fleet: Fleet) -> None:
    """Long enough to be reaped, it serves by its last table; healed, it learns what it missed."""
    async with under_load(fleet) as trial:
        with fleet.network.cut(directions("px-0", "redis")["both ways"]):
            trial.mark()
            await trial.within(12, "its reservations are given back", lambda: reaped(trial, "px-0"))
            done = await fleet.ask("scale", MODEL, str(REPLICAS + 1))
            assert done.code == 0, done
            await trial.within(
                30, "another replica is READY", lambda: ready(trial.registry, REPLICAS + 1)
            )
            await trial.goes_on()
        await trial.healed()
        await fleet.ask("scale", MODEL, str(REPLICAS))
    untouched(trial.report())


async def test_proxies_that_are_cut_one_way_from_redis_lose_nothing(fleet: Fleet) -> None:
    """Whether their words get lost or the answers, requests go on and the ledger is exact again."""
    async with under_load(fleet) as trial:
        pairs = (("px-0", "redis"), ("redis", "px-1"))
        with fleet.network.cut(pairs):
            trial.mark()
            await trial.within(10, "both do without", lambda: away(trial.registry))
            await trial.goes_on(2 * USERS)
        await trial.healed()
        await trial.same_engines()
    untouched(trial.report())


async def test_silent_agents_are_no_dead_engines(fleet: Fleet) -> None:
    """Cut off from Redis in any way, agents keep their engines, and the leader vouches for them."""
    cuts = directions("gpu-0", "redis")["both ways"], (("gpu-1", "redis"),), (("redis", "gpu-2"),)
    async with under_load(fleet) as trial:
        began = await last_event(trial.registry)
        with fleet.network.cut([pair for pairs in cuts for pair in pairs]):
            trial.mark()
            await trial.within(30, "all silent for 12 s", lambda: silent(trial.registry, 12))
            await trial.same_engines()
        await trial.healed()
        await trial.within(10, "all beat again", lambda: heard(trial.registry, 2))
        await trial.same_engines()
        told = {event.kind for event in await events(trial.registry, began)}
        assert not told & {"ReplicaUnhealthy", "ReplicaFailed", "ReplicaReplaced"}
    untouched(trial.report())


@pytest.mark.parametrize(
    ("direction", "wanted"),
    [("both ways", REPLICAS), ("there", REPLICAS), ("back", REPLICAS + 1)],
)
async def test_a_leader_that_is_cut_off_from_redis_is_followed(
    fleet: Fleet, direction: str, wanted: int
) -> None:
    """The standby leads within 1.5 lease times and acts; the old leader does nothing any more."""
    async with under_load(fleet) as trial:
        old = await leader_of(trial.registry)
        host = old.rpartition("-")[0]

        async def followed() -> bool:
            return await leader_of(trial.registry) not in {"", old}

        with fleet.network.cut(directions(host, "redis")[direction]):
            trial.mark()
            await trial.within(1.5 * LEASE_TTL_S, "another one leads", followed)
            new = await leader_of(trial.registry)
            await trial.within(15, "it acts", lambda: leads(trial.registry, new))
            if wanted > REPLICAS:
                done = await fleet.ask("scale", MODEL, str(wanted))
                assert done.code == 0, done
                await wait_until(
                    lambda: ready(trial.registry, wanted), timeout_s=30, what="it scales"
                )
        await trial.healed()
        await trial.within(10, "one leads", lambda: leads(trial.registry, new, alone=True))
        assert await leader_of(trial.registry) == new
        # The one that was cut off beats again only now.
        await trial.within(10, "all beat", lambda: whole(trial.registry, wanted))
        now = await ready_replicas(trial.registry, MODEL)
        assert all(now[rid].pid == replica.pid for rid, replica in trial.before.items())
        await fleet.ask("scale", MODEL, str(REPLICAS))
    untouched(trial.report())


@pytest.mark.parametrize("direction", ["both ways", "there", "back"])
async def test_a_replica_that_one_proxy_cannot_reach_loses_nothing(
    fleet: Fleet, direction: str
) -> None:
    """Its proxy notices in seconds and goes on elsewhere; the other proxy notices nothing."""
    async with under_load(fleet) as trial:
        host, victims = least_used_host(trial)

        async def used() -> bool:
            return await streams_on(trial.registry, "px-0", victims) > 1

        # The ledger spreads the requests of all proxies: those of one may all be elsewhere.
        await wait_until(used, what="the proxy has streams there")
        with fleet.network.cut(directions("px-0", host)[direction]):
            trial.mark()
            cut_s = time.monotonic()
            assert await streams_on(trial.registry, "px-0", victims) > 0
            await trial.within(
                NOTICED_S[direction] + STREAM_S,
                "nothing waits for it",
                lambda: avoided(trial, victims, cut_s),
            )
            await trial.goes_on()
        await trial.healed()
        await trial.same_engines()
    await used_again(fleet, trial, victims)
    report = trial.report()
    assert (report.ok, report.retried) == (report.count, 0), report
    ours, others = (
        sorted(r.ttft_s for r in trial.load.results if r.port == port) for port in PROXIES.values()
    )
    # The last one may have had a head and no token yet when the link was cut.
    assert ours[-1] < max(WAITED_S, NOTICED_S[direction]) + 1.5
    assert ours[-2] < WAITED_S + 1.5
    assert others[-1] < 4


@pytest.mark.alone  # percentiles of what others than the slow one do
async def test_slow_replicas_are_used_less_and_not_called_dead(fleet: Fleet) -> None:
    """A replica ten times slower gets few requests, and those of others take no longer than before.

    When all are as slow, they stay READY.
    """
    async with under_load(fleet, tokens=10) as trial:
        asked = len(trial.load.results)
        await trial.goes_on(SLOWED)
        usual_s = sorted(r.total_s for r in trial.load.results[asked:])
        slow = next(iter(trial.before.values()))
        await fleet.fault(slow, kind="slow", factor=10)
        slowed_s, asked = time.monotonic(), len(trial.load.results)
        await trial.goes_on(SLOWED)
        # Those that had begun before are slowed down midway, and belong to neither.
        took_s = sorted(
            r.total_s for r in trial.load.results[asked:] if r.ended_s - r.total_s >= slowed_s
        )
        others_s = [each_s for each_s in took_s if each_s <= 3 * 10 * STEP_MS / 1000]
        share = 1 - len(others_s) / len(took_s)
        for replica in trial.before.values():
            await fleet.fault(replica, kind="slow", factor=10)
        await trial.goes_on()
        for replica in trial.before.values():
            await fleet.fault(replica, kind="clear")
        await trial.goes_on()
        await trial.same_engines()
    before_s, meanwhile_s = (percentile(each, 99) for each in (usual_s, others_s))
    print(  # noqa: T201 - figures for the reader
        f"\nshare of requests on the slow replica: {share:.1%}; p99 of {len(others_s)} on others "
        f"{meanwhile_s * 1e3:.0f} ms, of {len(usual_s)} before {before_s * 1e3:.0f} ms"
    )
    untouched(trial.report(), ttft_s=8.0)
    assert share < 0.15
    assert meanwhile_s <= 1.1 * before_s


async def test_bad_links_to_replicas_cost_time_only(fleet: Fleet) -> None:
    """With 100 ms each way to one replica and 5 % loss to another, every stream comes whole."""
    async with under_load(fleet) as trial:
        far, worn = sorted({replica.host for replica in trial.before.values()})[:2]
        slow = [pair for px in PROXIES for pair in directions(px, far)["both ways"]]
        lossy = [pair for px in PROXIES for pair in directions(px, worn)["both ways"]]
        with (
            fleet.network.impaired(slow, delay_s=0.1),
            fleet.network.impaired(lossy, loss=0.05),
        ):
            await trial.goes_on(4 * USERS)
        await trial.healed()
        await trial.same_engines()
    untouched(trial.report(), ttft_s=5.0)


async def test_bad_links_to_redis_cost_nothing(fleet: Fleet) -> None:
    """With 200 ms to Redis for one proxy and 5 % loss for the other, requests do not wait."""
    late, lossy = (directions(px, "redis")["both ways"] for px in PROXIES)
    async with under_load(fleet) as trial:
        with (
            fleet.network.impaired(late, delay_s=0.1),
            fleet.network.impaired(lossy, loss=0.05),
        ):
            await trial.goes_on()
            settled = len(trial.load.results)
            await trial.goes_on(3 * USERS)
        ttft_s = sorted(r.ttft_s for r in trial.load.results[settled:] if r.port == PROXIES["px-0"])
        trial.figures["TTFT p90 with a late Redis"] = percentile(ttft_s, 90)
        await trial.healed()
        await trial.same_engines()
    untouched(trial.report())
    assert percentile(ttft_s, 90) < 1.0


def untouched(report: Report, *, ttft_s: float = 2.0) -> None:
    """Assert that no request failed, none was sent again, and none waited."""
    assert (report.ok, report.retried) == (report.count, 0), report
    assert percentile(report.ttft_s, 99) < ttft_s, report


async def ready(registry: Registry, count: int) -> bool:
    """Tell whether exactly `count` replicas are READY."""
    return len(await ready_replicas(registry, MODEL)) == count


async def reaped(trial: Trial, host: str) -> bool:
    """Tell whether the ledger knows no proxy of `host`."""
    names = await trial.registry.ledger.proxies(MODEL)
    return not any(name.startswith(host) for name in names)


async def away(registry: Registry) -> bool:
    """Tell whether every proxy does without the ledger."""
    reports = await reports_of(registry)
    return all(report.breaker == "open" for report in reports.values())


def least_used_host(trial: Trial) -> tuple[str, set[str]]:
    """Choose a host that has few of the replicas; gives its name and theirs."""
    by_host = {replica.host: set[str]() for replica in trial.before.values()}
    for replica in trial.before.values():
        by_host[replica.host].add(replica.rid)
    assert len(by_host) > 1, by_host
    return min(by_host.items(), key=lambda item: len(item[1]))


async def streams_on(registry: Registry, host: str, rids: set[str] | None = None) -> int:
    """Count what the proxy of `host` has on some replicas, or on all."""
    report = (await reports_of(registry))[host]
    live = report.requests.get(MODEL, {}).values()
    return sum(rids is None or each.rid in rids for each in live)


async def used_again(fleet: Fleet, trial: Trial, rids: set[str]) -> None:
    """See the proxy that was cut off use these replicas again, once its ejection has ended.

    Several requests at once on an otherwise idle fleet: busy users of the other proxy could keep a
    replica full for ever, each taking the place that its last request has just left.
    """
    count = 2 * REPLICAS

    async def reserved() -> bool:
        return await streams_on(registry, "px-0") == count

    async def burst() -> bool:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(trial.load.ask(0))
            await wait_until(reserved, what="all reserved")
            return await streams_on(registry, "px-0", rids) > 0

    async with fleet.registry() as registry:
        await trial.within(25, "used again", burst)
    trial.load.close()


async def avoided(trial: Trial, rids: set[str], cut_s: float) -> bool:
    """Tell whether the cut-off proxy has nothing on these replicas that is older than the cut."""
    report = (await reports_of(trial.registry))["px-0"]
    since_ms = (time.monotonic() - cut_s) * 1000
    return not any(
        live.rid in rids and live.age_ms > since_ms
        for live in report.requests.get(MODEL, {}).values()
    )


async def silent(registry: Registry, seconds: float) -> bool:
    """Tell whether no replica has been heard of for `seconds`."""
    return min(await ages_s(registry)) > seconds


async def heard(registry: Registry, seconds: float) -> bool:
    """Tell whether every replica has been heard of within `seconds`."""
    return max(await ages_s(registry)) < seconds


async def ages_s(registry: Registry) -> list[float]:
    """Read how old the last heartbeat of each replica is."""
    now_ms = await registry.replicas.server_time_ms()
    beats = await registry.replicas.heartbeats(MODEL)
    return [(now_ms - beat) / 1000 for beat in beats.values()]


async def leads(registry: Registry, name: str, *, alone: bool = False) -> bool:
    """Tell whether the controller says that it leads, and as the only one."""
    found = await leading(registry)
    return found == [name] if alone else name in found


async def last_event(registry: Registry) -> str | None:
    """Name the newest event."""
    newest = await registry.fleet.events(1)
    return newest[-1].id if newest else None


async def events(registry: Registry, since_id: str | None) -> list[Event]:
    """Read the events after one."""
    return await registry.fleet.events(200, since_id)
