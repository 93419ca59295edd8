"""The benchmark itself: it must run, notice bad answers, and judge what it measured rightly."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from tests.bench.__main__ import bench, chosen, table
from tests.bench.judging import Budget, Run, figure, judge, ratio
from tests.bench.machine import BenchError, Cores, build
from tests.bench.servers import SERVERS
from tests.bench.workloads import WORKLOADS, Answered, Spread, pair
from tests.unit.proxy.engine import Engine, Exchanged

STREAM = WORKLOADS["stream"]
MARK = "@0000000000000001#"


def run(server: str, cpu_us: float, number: int = 0, failed: int = 0) -> Run:
    """Make a run."""
    some = Spread(1.0, 2.0)
    answered = Answered(
        asked=10,
        good=10 - failed,
        tokens=100,
        seconds=2.0,
        cpu_s=0.1,
        failed={"reset": failed},
        first_failure="",
        ttft_ms=some,
        transit_ms=some,
        gap_ms=some,
        whole_ms=some,
    )
    return Run(
        round=number,
        server=server,
        answered=answered,
        cpu_us=cpu_us,
        pair_us=5.0,
        others_share=0.1,
        memory_bytes=2**20,
    )


def test_a_round_that_was_disturbed_does_not_decide() -> None:
    """Servers are compared within rounds, and the median of these ratios is what counts."""
    runs = {
        "a": [run("a", cost) for cost in (11.0, 90.0, 22.0)],
        "b": [run("b", cost) for cost in (10.0, 10.0, 20.0)],
    }
    assert ratio(runs, "a", "b") == pytest.approx(1.1)


@pytest.mark.parametrize(("cost", "kept"), [(12.5, True), (12.6, False)])
def test_a_budget_is_kept_up_to_its_bound(cost: float, *, kept: bool) -> None:
    """A ratio at the bound is kept, one above it is missed."""
    budget = Budget(workload="stream", server="a", against="b", ratio=1.25, says="cost")
    verdicts = judge(STREAM, {"a": [run("a", cost)], "b": [run("b", 10.0)]}, [budget])
    assert [verdict.kept for verdict in verdicts] == [kept]
    assert judge(WORKLOADS["unary"], {"a": [], "b": []}, [budget]) == []
    assert judge(STREAM, {"a": [run("a", cost)]}, [budget]) == []


def test_failed_answers_are_counted_over_all_rounds() -> None:
    """One bad answer in one round is seen in the figure."""
    shown = figure(STREAM, [run("a", 1.0), run("a", 3.0, failed=1), run("a", 2.0)])
    assert (shown.failed, shown.cpu_us, shown.per_s) == (1, 2.0, 50.0)


def test_servers_are_asked_in_one_order() -> None:
    """Whatever order is asked for, a round has the order of the table."""
    names = list(SERVERS)
    assert chosen(None, SERVERS) == names
    assert chosen(names[::-1], SERVERS) == names


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of both programs, compiled once."""
    folder = tmp_path_factory.mktemp("programs")
    for name in ("load", "replicas"):
        build(name, folder)
    return folder


async def good(exchanged: Exchanged) -> None:
    """Answer with two tokens."""
    await exchanged.begin_stream()
    await exchanged.text(f"{MARK}00001")
    await exchanged.text(f"{MARK}00002", "length")
    await exchanged.end_stream()


async def short(exchanged: Exchanged) -> None:
    """Lose a token."""
    await exchanged.begin_stream()
    await exchanged.text(f"{MARK}00001", "length")
    await exchanged.end_stream()


async def swapped(exchanged: Exchanged) -> None:
    """Send the second token first."""
    await exchanged.begin_stream()
    await exchanged.text(f"{MARK}00002")
    await exchanged.text(f"{MARK}00001", "length")
    await exchanged.end_stream()


async def without_done(exchanged: Exchanged) -> None:
    """End without the end mark."""
    await exchanged.begin_stream()
    await exchanged.text(f"{MARK}00001")
    await exchanged.text(f"{MARK}00002", "length")
    await exchanged.chunk(b"")


async def broken_off(exchanged: Exchanged) -> None:
    """Drop the connection after a token."""
    await exchanged.begin_stream()
    await exchanged.text(f"{MARK}00001")
    exchanged.reset()


async def refused(exchanged: Exchanged) -> None:
    """Refuse."""
    await exchanged.whole(503, b"{}")


@pytest.mark.parametrize(
    ("behave", "kind"),
    [
        (good, None),
        (short, "tokens"),
        (swapped, "tokens"),
        (without_done, "tokens"),
        (broken_off, "reset"),
        (refused, "status"),
    ],
)
async def test_the_load_generator_sees_bad_answers(
    programs: Path, behave: Callable[[Exchanged], Awaitable[None]], kind: str | None
) -> None:
    """An answer counts as good only if it is whole, in order, and ended; else its kind is told."""
    one = msgspec.structs.replace(STREAM, users=1, tokens=2, ramp_s=0.0, seconds=0.2)
    async with Engine(behave) as engine, pair(programs, Cores()) as running:
        answered = await running.run(one, int(engine.url.rpartition(":")[2]), "demo")
    kinds = {name for name, count in answered.failed.items() if count}
    assert answered.asked > 0
    assert kinds == ({kind} if kind else set())
    assert answered.good == (0 if kind else answered.asked)


def test_a_program_that_does_not_compile_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler's words are shown, and a missing compiler comes with its remedy."""
    with pytest.raises(BenchError, match="nonsense"):
        build("nonsense", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match="make system"):
        build("load", tmp_path)


async def test_the_benchmark_runs(programs: Path) -> None:
    """A short run on the real proxy measures its CPU time and loses nothing."""
    small = msgspec.structs.replace(STREAM, users=20, tokens=8, ramp_s=0.1, seconds=0.5)
    (outcome,) = await bench([small], ["redmesh-armed"], 1, programs)
    (each,) = outcome.figures
    assert each.failed == 0
    assert each.cpu_us > 0
    assert each.per_s > 0
    assert outcome.good
    assert "redmesh-armed" in table(outcome)
