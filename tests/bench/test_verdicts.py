"""From runs to verdicts: comparisons, budgets, the baseline and what is drawn. No I/O."""

from collections.abc import Sequence
from xml.etree import ElementTree as ET

import pytest

from tests.bench.baseline import Entry, Ratio, Trend, compare, measured, ratio_of, renewed
from tests.bench.budgets import ARMED, BUDGETS, DISARMED, Budget, Compared, judge
from tests.bench.judging import Measure, Run, figure, pair_weighs, ratios
from tests.bench.plot import Bar, Chart, cost_charts, measure_charts, svg, top_of
from tests.bench.report import conclude, table
from tests.bench.servers import SERVERS
from tests.bench.workloads import WORKLOADS, Answered, Spread

STREAM = WORKLOADS["stream"]
KB = 1000


def run(
    server: str,
    cpu_us: float,
    *,
    number: int = 0,
    failed: int = 0,
    jitter_ms: float = 0.5,
    per_s: float = 50.0,
    memory_bytes: int = 0,
) -> Run:
    """Make a run."""
    some = Spread(1.0, 2.0)
    answered = Answered(
        asked=10,
        good=10 - failed,
        tokens=100,
        in_flight=10,
        seconds=2.0,
        cpu_s=0.1,
        failed={"reset": failed},
        first_failure="reset: status 0" if failed else "",
        ttft_ms=some,
        added_ms=some,
        transit_ms=some,
        jitter_ms=Spread(0.1, jitter_ms),
        gap_ms=some,
        whole_ms=some,
    )
    return Run(
        round=number,
        server=server,
        answered=answered,
        cpu_us=cpu_us,
        pair_us=5.0,
        per_s=per_s,
        others_share=0.1,
        memory_bytes=2**20 + memory_bytes,
        idle_bytes=2**20,
    )


def runs_of(server: str, costs: Sequence[float]) -> list[Run]:
    """Make a run a round."""
    return [run(server, cost, number=number) for number, cost in enumerate(costs)]


def test_a_round_that_was_disturbed_does_not_decide() -> None:
    """Servers are compared within rounds, so that what hits a whole round hits neither of them."""
    runs = {"a": runs_of("a", (11.0, 99.0, 22.0)), "b": runs_of("b", (10.0, 90.0, 20.0))}
    assert ratios(runs, "a", "b") == pytest.approx([1.1, 1.1, 1.1])


@pytest.mark.parametrize(("cost", "kept"), [(12.5, True), (12.6, False)])
def test_a_budget_is_kept_up_to_its_bound(cost: float, *, kept: bool) -> None:
    """A ratio at the bound is kept, one above it is missed; without both servers none is judged."""
    budget = Budget(
        workload="stream",
        server="a",
        measure=Measure.CPU,
        bound=1.25,
        compared=Compared.RATIO,
        against="b",
    )
    runs = {"a": [run("a", cost)], "b": [run("b", 10.0)]}
    (verdict,) = judge("stream", runs, [budget])
    assert verdict.kept == kept
    assert ("MISSED" in str(verdict)) != kept
    assert judge("unary", runs, [budget]) == []
    assert judge("stream", {"a": runs["a"]}, [budget]) == []


@pytest.mark.parametrize(("mine", "kept"), [(99.0, False), (100.0, True)])
def test_a_bound_from_below(mine: float, *, kept: bool) -> None:
    """Throughput must reach that of the other server."""
    budget = Budget(
        workload="saturate",
        server="a",
        measure=Measure.RATE,
        bound=1.0,
        at_least=True,
        compared=Compared.RATIO,
        against="b",
    )
    runs = {"a": [run("a", 1.0, per_s=mine)], "b": [run("b", 1.0, per_s=100.0)]}
    assert [verdict.kept for verdict in judge("saturate", runs, [budget])] == [kept]


@pytest.mark.parametrize(("jitter_ms", "kept"), [(3.0, True), (3.2, False)])
def test_jitter_is_judged_beyond_that_of_nginx(jitter_ms: float, *, kept: bool) -> None:
    """What nginx has in the same round is no fault of ours."""
    runs = {"nginx": [run("nginx", 1.0, jitter_ms=1.0)]}
    runs[ARMED] = [run(ARMED, 1.0, jitter_ms=jitter_ms)]
    found = {v.budget.measure: v.kept for v in judge("stream", runs)}
    assert found[Measure.JITTER_P99] == kept


def test_one_bad_answer_in_one_round_misses_the_budget() -> None:
    """Failures are added up over the rounds, where everything else is a median."""
    runs = {ARMED: [run(ARMED, 1.0), run(ARMED, 3.0, failed=1), run(ARMED, 2.0)]}
    shown = figure(runs[ARMED])
    assert (shown.failed, shown.cpu_us) == (1, 2.0)
    (verdict,) = (v for v in judge("stream", runs) if v.budget.measure is Measure.FAILED)
    assert not verdict.kept
    assert "reset: status 0" in table(conclude(STREAM, runs, {}))


@pytest.mark.parametrize(("each_kb", "kept"), [(40, True), (41, False)])
def test_memory_is_counted_for_each_stream(each_kb: int, *, kept: bool) -> None:
    """What a server had before the load is not the streams'."""
    runs = {DISARMED: [run(DISARMED, 1.0, memory_bytes=10 * each_kb * KB)]}
    found = {v.budget.measure: v.kept for v in judge("long", runs)}
    assert found[Measure.STREAM_KB] == kept


def test_every_budget_names_what_there_is() -> None:
    """A budget of an unknown workload or server would never be judged."""
    assert {budget.workload for budget in BUDGETS} <= WORKLOADS.keys()
    assert {budget.server for budget in BUDGETS} <= SERVERS.keys()
    assert {budget.against for budget in BUDGETS} - {""} <= SERVERS.keys()


def test_a_pair_that_weighs_more_than_what_it_measures_is_told() -> None:
    """A light load tells nothing, a heavy one is said."""
    assert pair_weighs(STREAM, {"a": [run("a", 6.0)]}) == ""
    assert "5.0 µs" in pair_weighs(STREAM, {"a": [run("a", 4.0)]})


def ratio(median: float, low: float, high: float) -> Ratio:
    """Make a ratio."""
    return Ratio(median=median, low=low, high=high, rounds=5)


@pytest.mark.parametrize(
    ("now", "trend"),
    [
        (ratio(1.50, 1.48, 1.52), Trend.SAME),
        (ratio(1.56, 1.54, 1.58), Trend.SAME),  # beyond the quartiles, but not by 5 %
        (ratio(1.60, 1.51, 1.69), Trend.SAME),  # more than 5 %, but within the noise
        (ratio(1.60, 1.54, 1.66), Trend.WORSE),
        (ratio(1.40, 1.36, 1.46), Trend.BETTER),
    ],
)
def test_a_regression_is_one_beyond_noise(now: Ratio, trend: Trend) -> None:
    """Dearer means: the median by 5 %, and three quarters of now above three quarters of then."""
    (change,) = compare({ARMED: ratio(1.50, 1.47, 1.53)}, {ARMED: now, DISARMED: now})
    assert change.trend is trend
    assert trend.value in str(change)


def test_a_regression_fails_the_run() -> None:
    """What is dearer than the baseline makes the outcome bad, though every budget is kept."""
    runs = {"nginx": runs_of("nginx", [10.0] * 5), ARMED: runs_of(ARMED, [13.0] * 5)}
    assert conclude(STREAM, runs, {}).good
    then = {"stream": Entry(taken="once", servers={ARMED: ratio(1.2, 1.19, 1.21)})}
    assert not conclude(STREAM, runs, then).good


def test_too_few_rounds_are_not_compared() -> None:
    """Two rounds have no spread to speak of; three do; without nginx there is no ratio."""
    beside = {"nginx": runs_of("nginx", (10.0, 10.0)), ARMED: runs_of(ARMED, (15.0, 16.0))}
    assert measured(beside) == {}
    beside = {"nginx": runs_of("nginx", [10.0] * 3), ARMED: runs_of(ARMED, (15.0, 16.0, 17.0))}
    assert measured(beside) == {ARMED: Ratio(median=1.6, low=1.55, high=1.65, rounds=3)}
    assert measured({ARMED: beside[ARMED]}) == {}


def test_a_renewed_baseline_keeps_what_was_not_measured() -> None:
    """Only workloads of this run are replaced."""
    old = {"unary": Entry(taken="then", servers={ARMED: ratio(3.0, 2.9, 3.1)})}
    now = {"stream": {ARMED: ratio_of([1.5, 1.6, 1.7])}, "long": {}}
    new = renewed(old, "now", now)
    assert new.keys() == {"unary", "stream"}
    assert (new["unary"].taken, new["stream"].taken) == ("then", "now")


def test_charts_show_each_server_beside_nginx() -> None:
    """CPU time is drawn as ratios with the spread of the rounds, the rest as it is."""
    runs = {
        "nginx": runs_of("nginx", (10.0, 10.0, 10.0)),
        ARMED: runs_of(ARMED, (15.0, 16.0, 17.0)),
        "direct": runs_of("direct", (0.0, 0.0, 0.0)),
    }
    (chart,) = cost_charts({"stream": runs, "unary": {ARMED: runs[ARMED]}})
    assert [bar.label for bar in chart.bars] == ["nginx", ARMED]
    assert chart.bars[1] == Bar(label=ARMED, value=1.6, low=1.55, high=1.65)
    (other,) = measure_charts({"stream": runs}, [Measure.ADDED_P99], ["stream", "headline"])
    assert [bar.value for bar in other.bars] == [2.0, 2.0]


def test_what_is_drawn_is_svg_with_every_label() -> None:
    """The picture parses, names what it shows, and no bar leaves it."""
    bars = tuple(Bar(label=f"<{n}>", value=n * 1.7, low=n, high=n * 2.0) for n in range(1, 5))
    drawn = svg([Chart(title="stream & more", unit="ms", bars=bars)] * 2)
    root = ET.fromstring(drawn)  # noqa: S314 - our own
    words = "".join(root.itertext())
    assert all(bar.label in words for bar in bars)
    assert "stream & more" in words
    widths = [float(each.get("width", "0")) for each in root.iter() if each.tag.endswith("rect")]
    assert max(widths) == float(root.get("width", "0"))


@pytest.mark.parametrize(("highest", "top"), [(1.0, 1.0), (1.6, 2.0), (4.2, 4.5), (0.0, 1.0)])
def test_an_axis_ends_at_a_round_number(highest: float, top: float) -> None:
    """The end of an axis is above every bar and has two digits."""
    bar = Bar(label="a", value=highest, low=highest, high=highest)
    assert top_of(Chart(title="", unit="", bars=(bar,))) == pytest.approx(top)
