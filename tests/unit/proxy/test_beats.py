"""Beats: the ledger is compared when it must be, repaired, and silent peers are reaped."""

import pytest

from services.proxy.live import Holding
from shared.errors import RegistryUnavailableError
from shared.models.routing import Lease
from shared.registry.ledger import Adopt
from tests.support.waiting import wait_until
from tests.unit.proxy.rig import Rig


def lease(request: str, rid: str = "demo-0", cost_tokens: int = 10) -> Lease:
    """Make a lease."""
    return Lease(request=request, rid=rid, cost_tokens=cost_tokens)


def hold(rig: Rig, request: str, rid: str = "demo-0", cost_tokens: int = 10) -> None:
    """Make a live request of this proxy."""
    rig.served.reservations.live.add(request, Holding(rid, cost_tokens, 0.0))


async def test_stale_lease_is_released() -> None:
    """A lease without a live request is released at the next beat."""
    async with Rig() as rig:
        await rig.beats.beat(rig.served)
        rig.ledger.held["ghost"] = lease("ghost")
        await rig.beats.beat(rig.served)
        await wait_until(lambda: not rig.ledger.held)


async def test_forgotten_proxy_adopts() -> None:
    """A proxy that Redis has forgotten re-adopts every live request, where it really is."""
    async with Rig() as rig:
        hold(rig, "one")
        hold(rig, "two", "demo-1")
        rig.ledger.known = False
        await rig.beats.beat(rig.served)
        await wait_until(lambda: len(rig.ledger.held) == 2)
        assert rig.ledger.held["two"].rid == "demo-1"


async def test_due_comparison_finds_moved_leases() -> None:
    """Equal counts hide a moved lease or another cost; the regular comparison finds both."""
    async with Rig() as rig:
        hold(rig, "moved")
        hold(rig, "costly")
        rig.ledger.held["moved"] = lease("moved", "demo-9")
        rig.ledger.held["costly"] = lease("costly", cost_tokens=99)
        rig.served.reservations.dirty = True
        await rig.beats.beat(rig.served)
        await wait_until(lambda: rig.ledger.held["moved"].rid == "demo-0")
        await wait_until(lambda: rig.ledger.held["costly"].cost_tokens == 10)


@pytest.mark.parametrize("sign", ["a beat was lost", "an older version"])
async def test_a_failover_that_forgot_shows_though_counts_are_equal(sign: str) -> None:
    """One lease too few and one too many: whatever hints at another server has them compared."""
    async with Rig() as rig:
        hold(rig, "new")
        rig.ledger.held["new"] = lease("new")
        await rig.beats.beat(rig.served)
        rig.ledger.held = {"ended": lease("ended")}
        await rig.beats.beat(rig.served)
        assert set(rig.ledger.held) == {"ended"}, "equal counts show nothing"
        if sign == "a beat was lost":
            rig.ledger.error = RegistryUnavailableError("away")
            await rig.beats.beat(rig.served)
            rig.ledger.error = None
        else:
            rig.ledger.ver -= 1
        await rig.beats.beat(rig.served)
        await wait_until(lambda: set(rig.ledger.held) == {"new"}, what="it is repaired")


async def test_equal_means_no_repair() -> None:
    """When ledger and live requests agree, nothing is sent."""
    async with Rig() as rig:
        hold(rig, "one")
        rig.ledger.held["one"] = lease("one")
        rig.served.reservations.dirty = True
        await rig.beats.beat(rig.served)
        assert rig.ledger.batches == []
        assert not rig.served.reservations.dirty


async def test_fast_beat_closes_the_breaker_and_repairs() -> None:
    """After an outage the first fast beat closes the breaker, and live requests are adopted."""
    async with Rig() as rig:
        reservations = rig.served.reservations
        rig.ledger.error = RegistryUnavailableError("away")
        for _ in range(3):
            await rig.beats.beat(rig.served)
        assert reservations.breaker.open
        hold(rig, "meanwhile")
        rig.ledger.error = None
        await rig.beats.beat(rig.served)
        assert not reservations.breaker.open
        await wait_until(lambda: "meanwhile" in rig.ledger.held)
        assert [type(op) for op in rig.ledger.batches[-1]] == [Adopt]


async def test_drift_shows_in_a_metric_until_it_is_repaired() -> None:
    """The metric says how many reservations too many or too few there were at the last beat."""
    async with Rig() as rig:

        def drift() -> float | None:
            labels = {"model": "demo"}
            return rig.metrics.registry.get_sample_value("redmesh_proxy_ledger_drift", labels)

        await rig.beats.beat(rig.served)
        assert drift() == 0
        rig.ledger.held |= {name: lease(name) for name in ("ghost", "phantom")}
        await rig.beats.beat(rig.served)
        assert drift() == 2
        await wait_until(lambda: not rig.ledger.held, what="the beat repaired it")
        await rig.beats.beat(rig.served)
        assert drift() == 0
        hold(rig, "one")
        await rig.beats.beat(rig.served)
        assert drift() == -1
        await wait_until(lambda: "one" in rig.ledger.held, what="the beat repaired it")
        await wait_until(lambda: not rig.served.reservations.unsettled, what="nothing is under way")
        await rig.beats.beat(rig.served)
        assert drift() == 0


async def test_foreign_version_asks_for_the_snapshot() -> None:
    """A version in a beat that the table does not have makes it be read again, newer or older."""
    async with Rig() as rig:
        rig.ledger.ver = 9
        await rig.beats.beat(rig.served)
        assert rig.stale == ["demo"]


async def test_silent_peers_are_reaped() -> None:
    """A silent peer is reaped in rounds until nothing is left; this proxy itself never is."""
    async with Rig() as rig:
        rig.ledger.silent = ["px", "px-dead"]
        await rig.beats.beat(rig.served)
        assert rig.ledger.reaped == ["px-dead", "px-dead"]


async def test_lost_operations_may_come_late() -> None:
    """For some seconds after operations were lost every beat compares: one may arrive meanwhile."""
    async with Rig() as rig:
        hold(rig, "one")
        rig.ledger.held["one"] = lease("one")
        rig.served.reservations.dirty = True
        await rig.beats.beat(rig.served)
        rig.ledger.held["one"] = lease("one", cost_tokens=99)
        await rig.beats.beat(rig.served)
        await wait_until(lambda: rig.ledger.held["one"].cost_tokens == 10)


async def test_totals_are_worked_out_anew_when_a_comparison_is_due() -> None:
    """With the regular comparison totals are recounted; what was wrong shows in a metric."""
    async with Rig() as rig:
        rig.ledger.wrong_totals = 3
        await rig.beats.beat(rig.served)
        await rig.beats.beat(rig.served)
        assert rig.ledger.recounts == 1
        shown = rig.metrics.registry.get_sample_value(
            "redmesh_proxy_ledger_recounted_total", {"model": "demo"}
        )
        assert shown == 3
