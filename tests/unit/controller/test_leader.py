from services.controller.leader import Leader
from shared.clock import ManualClock
from shared.errors import RegistryUnavailableError
from shared.registry.leadership import Following, Leading


class ScriptedLease:
    """Answers as told, and takes as long as told."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self.epoch = 1
        self.holder = ""
        self.delay_s = 0.0
        self.left_ms = 5_000
        self.away = False
        self.resigned = 0

    async def try_lead(self, owner: str, ttl_ms: int) -> Leading | Following:
        """Give the lease to whoever asks, unless somebody else holds it."""
        self._clock.advance(self.delay_s)
        if self.away:
            raise RegistryUnavailableError("away")
        if self.holder not in {"", owner}:
            return Following(self.holder, self.left_ms)
        return Leading(self.epoch, ttl_ms)

    async def resign(self, owner: str) -> None:
        """Note that it was given back, and mint a higher epoch for the next holder."""
        assert owner == "c1"
        self.resigned += 1
        self.epoch += 1


def candidate() -> tuple[Leader, ScriptedLease, ManualClock]:
    """Make a candidate with a lease of five seconds."""
    clock = ManualClock()
    lease = ScriptedLease(clock)
    return Leader(lease, clock, "c1", ttl_ms=5_000), lease, clock


async def test_a_leader_acts_for_seventy_percent_of_its_lease() -> None:
    """Without a renewal a reign ends 3.5 s after the request for the lease left."""
    leader, _, clock = candidate()
    await leader.campaign()
    assert leader.reign() is not None
    clock.advance(3.49)
    assert leader.reign() is not None
    clock.advance(0.01)
    assert leader.reign() is None


async def test_a_slow_reply_shortens_the_reign() -> None:
    """Time is counted from before the request left: a reply after 3.5 s gives no reign at all."""
    leader, lease, clock = candidate()
    lease.delay_s = 3.0
    await leader.campaign()
    assert leader.reign() is not None
    clock.advance(0.5)
    assert leader.reign() is None
    lease.delay_s = 4.0
    await leader.campaign()
    assert leader.reign() is None


async def test_renewing_keeps_the_same_reign() -> None:
    """A leader that renews in time keeps its reign, with its epoch and its beginning."""
    leader, _, clock = candidate()
    await leader.campaign()
    first = leader.reign()
    for _ in range(20):
        clock.advance(1.0)
        await leader.campaign()
    assert leader.reign() == first


async def test_redis_away_lets_the_reign_run_out_and_back_begins_a_new_one() -> None:
    """An outage ends the reign by time; afterwards a new one begins, and things must settle."""
    leader, lease, clock = candidate()
    await leader.campaign()
    first = leader.reign()
    assert first is not None
    lease.away = True
    clock.advance(1.0)
    await leader.campaign()
    assert leader.may_act(first)
    assert leader.problem == "away"
    clock.advance(2.5)
    assert not leader.may_act(first)
    lease.away = False
    await leader.campaign()
    again = leader.reign()
    assert again is not None
    assert again.since_s > first.since_s
    assert leader.problem is None


async def test_a_fenced_leader_stops_and_asks_for_a_higher_epoch() -> None:
    """FENCED ends the reign at once; the next campaign gives the old lease back first."""
    leader, lease, _ = candidate()
    await leader.campaign()
    leader.fenced_off()
    assert leader.reign() is None
    await leader.campaign()
    assert lease.resigned == 1
    reign = leader.reign()
    assert reign is not None
    assert reign.epoch == 2


async def test_another_holder_ends_the_reign() -> None:
    """Learning that somebody else leads ends the reign, whatever time was left."""
    leader, lease, _ = candidate()
    await leader.campaign()
    lease.holder = "c2"
    await leader.campaign()
    assert leader.reign() is None


async def test_resigning_gives_the_lease_back() -> None:
    """A controller that ends leaves no lease for others to wait for."""
    leader, lease, _ = candidate()
    await leader.campaign()
    await leader.resign()
    assert leader.reign() is None
    assert lease.resigned == 1


async def test_a_follower_asks_again_when_the_lease_ends() -> None:
    """It waits as usual, but not beyond the end of the lease it saw; others wait as usual."""
    leader, lease, clock = candidate()
    assert leader.pause_s(1.0) == 1.0
    await leader.campaign()
    assert leader.pause_s(1.0) == 1.0
    lease.holder = "c2"
    await leader.campaign()
    assert leader.pause_s(1.0) == 1.0
    clock.advance(4.6)
    assert 0.4 < leader.pause_s(1.0) < 0.45
    clock.advance(3.0)
    assert 0 < leader.pause_s(1.0) < 0.1
    lease.holder = ""
    await leader.campaign()
    assert leader.pause_s(1.0) == 1.0
