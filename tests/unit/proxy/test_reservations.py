"""The batcher: one call per turn of the loop, never a wait on Redis, and no operation lost."""

import asyncio
import random
from collections.abc import Sequence

import pytest

from services.proxy import reservations
from services.proxy.breaker import RedisBreaker
from services.proxy.metrics import LedgerMetrics, Metrics
from services.proxy.reservations import LONE_CALLS, Reservations
from shared.errors import RegistryTimeoutError, RegistryUnavailableError
from shared.registry.ledger import NONE, Adopt, Release, Reserve
from tests.support.waiting import wait_until
from tests.unit.proxy.rig import MODEL, MemoryLedger, replica


class Desk:
    """Reservations over a ledger in memory, with the answers they gave."""

    def __init__(self, rids: Sequence[str] = ("a", "b")) -> None:
        self.ledger = MemoryLedger({rid: replica(rid, "http://x:1") for rid in rids})
        self.answers: dict[str, str] = {}
        self.versions: list[int] = []
        self.local: list[str] = []
        self.breaker = RedisBreaker()
        self.reservations = Reservations(
            model=MODEL,
            proxy="px",
            ledger=self.ledger,
            breaker=self.breaker,
            choose_locally=self._choose,
            saw_version=self.versions.append,
            metrics=LedgerMetrics(Metrics(), MODEL),
            random=random.Random(1),
        )

    def _choose(self, exclude: Sequence[str]) -> str:
        choice = next((rid for rid in ("b", "a") if rid not in exclude), NONE)
        self.local.append(choice)
        return choice

    def reserve(self, request: str, exclude: tuple[str, ...] = ()) -> None:
        """Reserve, and note the answer."""
        self.reservations.reserve(
            request, 10, exclude, lambda answer: self.answers.__setitem__(request, answer)
        )

    def settled(self) -> bool:
        """Tell whether nothing is under way."""
        return not self.reservations.unsettled


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no reserve decided locally, however busy the machine is."""
    monkeypatch.setattr(reservations, "RESERVE_DEADLINE_S", 60.0)


@pytest.mark.usefixtures("patient")
async def test_one_batch_per_turn() -> None:
    """All operations of one turn of the loop travel in one call, in order."""
    desk = Desk()
    for number in range(10):
        desk.reserve(f"r{number}")
    await wait_until(desk.settled)
    assert [len(batch) for batch in desk.ledger.batches] == [10]
    desk.reservations.release("r0")
    desk.reservations.settle("r1", 5)
    desk.reserve("r10")
    await wait_until(desk.settled)
    assert [type(op) for op in desk.ledger.batches[1]] == [Release, Adopt, Reserve]
    assert desk.versions == [10, 10]
    assert desk.reservations.live.own == {"a": 5, "b": 5}


@pytest.mark.usefixtures("patient")
async def test_a_lone_reserve_does_not_wait_for_its_turns_end() -> None:
    """Where calls have had one reserve each, the next is sent at once; company ends that."""
    desk = Desk()
    for number in range(LONE_CALLS):
        desk.reserve(f"r{number}")
        assert len(desk.ledger.batches) == number  # at the turn's end
        await wait_until(desk.settled)
    desk.reservations.release("r0")
    desk.reserve("alone")
    assert len(desk.ledger.batches) == LONE_CALLS + 1
    desk.reserve("second")
    desk.reserve("third")
    assert len(desk.ledger.batches) == LONE_CALLS + 1  # while a call is under way, others gather
    await wait_until(desk.settled)
    assert [len(batch) for batch in desk.ledger.batches[LONE_CALLS:]] == [2, 2]
    desk.reserve("with company")
    assert len(desk.ledger.batches) == LONE_CALLS + 2


@pytest.mark.usefixtures("patient")
async def test_batches_are_bounded() -> None:
    """A call carries at most 64 operations, and at most two calls are under way."""
    desk = Desk()
    desk.ledger.open.clear()
    for number in range(200):
        desk.reserve(f"r{number}")
    await wait_until(lambda: len(desk.ledger.batches) == 2)
    assert [len(batch) for batch in desk.ledger.batches] == [64, 64]
    desk.ledger.open.set()
    await wait_until(desk.settled)
    assert [len(batch) for batch in desk.ledger.batches] == [64, 64, 64, 8]
    assert len(desk.ledger.held) == 200


@pytest.mark.usefixtures("patient")
async def test_operations_of_a_request_keep_their_order() -> None:
    """A release never overtakes an adopt of the same request that is still under way."""
    desk = Desk()
    desk.reserve("r")
    await wait_until(desk.settled)
    desk.ledger.open.clear()
    desk.reservations.settle("r", 3)
    await wait_until(lambda: len(desk.ledger.batches) == 2)
    desk.reservations.release("r")
    desk.reserve("other")
    await wait_until(lambda: len(desk.ledger.batches) == 3)
    assert [type(op) for op in desk.ledger.batches[2]] == [Reserve]
    desk.ledger.open.set()
    await wait_until(desk.settled)
    assert list(desk.ledger.held) == ["other"]


async def test_late_answer_is_corrected() -> None:
    """A reserve that misses its deadline is decided locally, and the ledger is moved to that."""
    desk = Desk()
    desk.ledger.open.clear()
    desk.reserve("r")
    await wait_until(lambda: desk.answers == {"r": "b"})
    desk.ledger.open.set()
    await wait_until(desk.settled)
    await wait_until(lambda: desk.ledger.held["r"].rid == "b")
    assert len(desk.reservations.live) == 1


async def test_late_answer_of_an_ended_request_is_released() -> None:
    """A reserve that is executed after its request has ended leaves nothing behind."""
    desk = Desk()
    desk.ledger.open.clear()
    desk.reserve("r")
    await wait_until(lambda: desk.answers)
    desk.reservations.release("r")
    desk.ledger.open.set()
    await wait_until(desk.settled)
    await wait_until(lambda: not desk.ledger.held)


async def test_misses_open_the_breaker() -> None:
    """Five missed deadlines in a row open the breaker; from then on nothing waits."""
    desk = Desk()
    desk.ledger.open.clear()
    for number in range(5):
        desk.reserve(f"r{number}")
        await wait_until(lambda number=number: f"r{number}" in desk.answers)
    assert desk.breaker.open
    desk.reserve("now")
    assert desk.answers["now"] == "b"
    assert desk.reservations.dirty
    desk.ledger.open.set()
    await wait_until(desk.settled)


async def test_a_burst_is_one_miss() -> None:
    """A burst that waits on one slow call counts as one miss, not as many."""
    desk = Desk()
    desk.ledger.open.clear()
    for number in range(60):
        desk.reserve(f"r{number}")
    await wait_until(lambda: len(desk.answers) == 60)
    assert not desk.breaker.open
    desk.ledger.open.set()
    await wait_until(desk.settled)


async def test_errors_open_the_breaker() -> None:
    """Three errors open the breaker; every request is answered all the same."""
    desk = Desk()
    desk.ledger.error = RegistryUnavailableError("away")
    for number in range(3):
        desk.reserve(f"r{number}")
        await wait_until(lambda number=number: f"r{number}" in desk.answers)
    assert desk.breaker.open
    assert set(desk.answers.values()) == {"b"}
    desk.reservations.release("r0")
    assert desk.settled()
    assert desk.reservations.dirty


async def test_opening_decides_what_waits() -> None:
    """What waits when the breaker opens, queued or under way, is decided locally at once."""
    desk = Desk()
    desk.ledger.open.clear()
    for number in range(200):
        desk.reserve(f"r{number}")
    await wait_until(lambda: len(desk.ledger.batches) == 2)
    desk.reservations.opened()
    assert len(desk.answers) == len(desk.local) == 200
    desk.ledger.open.set()
    await wait_until(desk.settled)
    # Those that were under way were executed late: the ledger is moved to what was decided.
    assert {lease.rid for lease in desk.ledger.held.values()} == {"b"}
    assert desk.reservations.live.own == {"b": 200}


async def test_lost_reply_is_repaired() -> None:
    """When a call was executed but its reply lost, a comparison makes the ledger true."""
    desk = Desk()
    desk.ledger.error = RegistryTimeoutError("lost")
    desk.ledger.lose_reply = True
    desk.reserve("stays")
    desk.reserve("ends")
    await wait_until(lambda: len(desk.answers) == 2)
    desk.ledger.error = None
    desk.reservations.live.remove("ends")
    repair = desk.reservations.live.compare(desk.ledger.held, ())
    desk.reservations.repair(repair.adopt, repair.release)
    await wait_until(desk.settled)
    assert {name: lease.rid for name, lease in desk.ledger.held.items()} == {"stays": "b"}


@pytest.mark.usefixtures("patient")
async def test_comparison_leaves_the_unsettled_alone() -> None:
    """A comparison does not touch requests with an operation under way."""
    desk = Desk()
    desk.reserve("r")
    await wait_until(desk.settled)
    desk.ledger.open.clear()
    desk.reservations.release("r")
    desk.reserve("new")
    await asyncio.sleep(0)
    repair = desk.reservations.live.compare(desk.ledger.held, desk.reservations.unsettled)
    assert (repair.adopt, repair.release) == ([], [])
    desk.ledger.open.set()
    await wait_until(desk.settled)


async def test_flushed() -> None:
    """Waiting for the last releases sends them, and gives up at its deadline."""
    desk = Desk()
    desk.reserve("r")
    await wait_until(desk.settled)
    desk.reservations.release("r")
    await desk.reservations.flushed(1.0)
    assert not desk.ledger.held
    desk.ledger.open.clear()
    desk.reserve("s")
    await desk.reservations.flushed(0.05)
    assert not desk.settled()
    await desk.reservations.aclose()


async def test_excluded_replicas() -> None:
    """Exclusions reach the ledger and the local choice alike."""
    desk = Desk()
    desk.reserve("r", exclude=("a",))
    await wait_until(lambda: desk.answers == {"r": "b"})
    desk.reserve("s", exclude=("a", "b"))
    await wait_until(lambda: desk.answers.get("s") == NONE)
    desk.reservations.opened()
    assert len(desk.reservations.live) == 1
