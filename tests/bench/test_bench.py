"""The benchmark itself: it must run, notice bad answers, and judge what it measured rightly."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from tests.bench.__main__ import (
    Plan,
    bench,
    chosen,
    read_baseline,
    servers,
    workloads,
    write_baseline,
)
from tests.bench.machine import BenchError, Cores, build
from tests.bench.report import Outcome
from tests.bench.servers import SERVERS
from tests.bench.site import begun
from tests.bench.workloads import WORKLOADS, Workload, pair
from tests.unit.proxy.engine import Engine, Exchanged

STREAM = WORKLOADS["stream"]


def text(number: int) -> str:
    """Write a token as the replicas do."""
    return f"@{1:016}#{number:05}~{0:07}"


def plan(workloads: Sequence[Workload], servers: Sequence[str], *not_http: str) -> Plan:
    """Plan one round of some workloads."""
    return Plan(workloads, servers, not_http, rounds=1, baseline={}, cores=Cores())


def test_servers_are_asked_in_one_order() -> None:
    """Whatever order is asked for, a round has the order of the table."""
    names = list(SERVERS)
    assert chosen(None, SERVERS) == names
    assert chosen(names[::-1], SERVERS) == names


def test_a_peer_that_is_not_installed_is_left_out_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the peers the benchmark goes on, and says how to get them."""
    monkeypatch.setattr("tests.bench.peers.HOME", tmp_path)
    assert servers(["redmesh-armed", "vllm-router"]) == ["redmesh-armed"]
    (line,) = capsys.readouterr().out.splitlines()
    assert "vllm-router" in line
    assert "make bench-peers" in line


def test_a_workload_that_needs_more_files_than_allowed_is_made_smaller(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the file limit cannot be raised, what would fail is not begun; the remedy is told."""

    def refused(wanted: int) -> int:
        return min(wanted, 4200)

    monkeypatch.setattr("tests.bench.__main__.raise_file_limit", refused)
    unary, long = workloads(["unary", "long"], None)
    assert (unary.users, long.users) == (WORKLOADS["unary"].users, 2000)
    assert "2,000 at once instead of 10,000" in (said := capsys.readouterr().out)
    assert "ulimit -Hn 20200" in said


def test_a_baseline_that_cannot_be_read_comes_with_its_remedy(tmp_path: Path) -> None:
    """A broken baseline is told with the option that renews it; none at all is no error."""
    path = tmp_path / "baseline.json"
    assert read_baseline(path) == {}
    path.write_text('{"unary": 7}')
    with pytest.raises(BenchError, match="--write-baseline"):
        read_baseline(path)


async def test_a_server_that_does_not_begin_is_told_with_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever waits in vain reads why, in the server's own last words."""

    async def never() -> bool:
        return False

    monkeypatch.setattr("tests.bench.site.START_S", 0.01)
    monkeypatch.setattr("tests.bench.site.ASK_AGAIN_S", 0.01)
    log = tmp_path / "log"
    with pytest.raises(BenchError, match="other serves"):
        await begun(never, "other", log)
    log.write_text("port 7 is taken")
    with pytest.raises(BenchError, match="port 7 is taken"):
        await begun(never, "other", log)


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
    await exchanged.text(text(1))
    await exchanged.text(text(2), "length")
    await exchanged.end_stream()


async def short(exchanged: Exchanged) -> None:
    """Lose a token."""
    await exchanged.begin_stream()
    await exchanged.text(text(1), "length")
    await exchanged.end_stream()


async def swapped(exchanged: Exchanged) -> None:
    """Send the second token first."""
    await exchanged.begin_stream()
    await exchanged.text(text(2))
    await exchanged.text(text(1), "length")
    await exchanged.end_stream()


async def without_done(exchanged: Exchanged) -> None:
    """End without the end mark."""
    await exchanged.begin_stream()
    await exchanged.text(text(1))
    await exchanged.text(text(2), "length")
    await exchanged.chunk(b"")


async def broken_off(exchanged: Exchanged) -> None:
    """Drop the connection after a token."""
    await exchanged.begin_stream()
    await exchanged.text(text(1))
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


@pytest.mark.parametrize("rate", [0.0, 40.0])
async def test_the_benchmark_runs(programs: Path, tmp_path: Path, rate: float) -> None:
    """A short run on the real proxy, of either loop, measures its CPU time and loses nothing."""
    small = msgspec.structs.replace(
        STREAM, name=f"small-{rate:g}", users=20, tokens=8, ramp_s=0.1, seconds=0.5, rate=rate
    )
    (outcome,) = await bench(plan([small], ["redmesh-armed"]), programs)
    assert isinstance(outcome, Outcome)
    (each,) = outcome.figures
    assert each.failed == 0
    assert each.cpu_us > 0
    assert each.per_s > 0
    assert 0 < each.in_flight <= 20
    assert outcome.good
    assert "redmesh-armed" in outcome.text()
    write_baseline(tmp_path / "baseline.json", {}, [outcome], Cores())
    assert read_baseline(tmp_path / "baseline.json") == {}  # nothing beside nginx was measured


async def test_a_workload_of_another_kind_has_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What asks no server gets a folder and the rounds, and is judged with the others."""
    asked: list[tuple[Path, int | None]] = []

    class Other:
        good = False

        def text(self) -> str:
            return "bad"

    async def other(folder: Path, cores: Cores, rounds: int | None) -> Other:
        asked.append((folder, rounds))
        return Other()

    monkeypatch.setattr("tests.bench.__main__.NOT_HTTP", {"other": other})
    (outcome,) = await bench(plan([], [], "other"), tmp_path)
    assert not outcome.good
    assert asked == [(tmp_path / "other", 1)]
