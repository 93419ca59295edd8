"""A small comparison in every test run: the order of the policies, and that the tools work."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.routing.__main__ import main
from tests.routing.contenders import contenders
from tests.routing.fleet import host
from tests.routing.judging import DEFAULT, REFERENCE, TTFT_P99_AT_MOST, faults
from tests.routing.plot import drawn
from tests.routing.report import Result, table
from tests.routing.run import Outcome, Scenario, simulate, speeds_of
from tests.routing.traces import SAMPLE, Arrival, generated, load, rate_per_s, text_of

RATE_PER_S = 110.0
"""Some 80 % of what the fleet below ends of the sample when all is offered at once."""
NAMES = (
    "random",
    REFERENCE,
    "least requests, 100 ms old",
    "least requests, exact",
    "least tokens, exact",
    DEFAULT,
)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Drive the sample through the fleet under a few policies."""
    arrivals = load(SAMPLE)
    scenario = Scenario(speeds=speeds_of(16), stretch=rate_per_s(arrivals) / RATE_PER_S)
    scripts = host()
    return {name: simulate(arrivals, scenario, contenders()[name], scripts) for name in NAMES}


def test_the_sample_is_what_its_generator_makes() -> None:
    """The trace that ships comes from a seed, and from nothing else."""
    assert SAMPLE.read_text() == text_of(generated(500, seed=1))
    assert load(SAMPLE) == generated(500, seed=1)


def test_the_default_leads(outcomes: dict[str, Outcome]) -> None:
    """Least tokens with affinity keeps its lead over a load balancer, and nobody has more goodput.

    The order of the others holds too: who sees more decides better, and stale counts are worse
    than one's own.
    """
    p99 = {name: one.ttft_p99_s for name, one in outcomes.items()}
    assert p99[DEFAULT] <= TTFT_P99_AT_MOST * p99[REFERENCE]
    assert p99[DEFAULT] < p99["least tokens, exact"] < p99[REFERENCE] < p99["random"]
    assert p99[REFERENCE] < p99["least requests, 100 ms old"]
    assert outcomes[DEFAULT].goodput >= max(one.goodput for one in outcomes.values())


def test_affinity_finds_what_caches_hold(outcomes: dict[str, Outcome]) -> None:
    """With affinity half as many prompt tokens again come from the caches, or more."""
    hits = {name: one.hit_rate for name, one in outcomes.items()}
    assert hits[DEFAULT] >= 1.5 * hits["least tokens, exact"]


def test_a_run_is_replayed_by_its_seed() -> None:
    """The same trace, fleet and seed give the same figures to the last digit."""
    arrivals = load(SAMPLE)[:120]
    scenario = Scenario(speeds=speeds_of(8), stretch=0.02)
    runs = [simulate(arrivals, scenario, contenders()[DEFAULT], host()) for _ in range(2)]
    assert runs[0] == runs[1]
    other = simulate(arrivals, replace(scenario, seed=2), contenders()[DEFAULT], host())
    assert other != runs[0]


def test_what_is_missed_is_named(outcomes: dict[str, Outcome]) -> None:
    """A default that lost its lead, or its goodput, is told apart from one that kept them."""
    result = Result(
        trace="t",
        utilization=0.8,
        capacity_per_s=1.0,
        scenario=Scenario(speeds=(1.0,)),
        outcomes=outcomes,
    )
    assert faults(result) == []
    slow = {**outcomes, DEFAULT: outcomes["random"]}
    missed = faults(replace(result, outcomes=slow))
    assert "p99 TTFT is" in missed[0]
    assert any("the goodput of" in one for one in missed)
    assert faults(replace(result, outcomes={})) == []


def test_the_table_and_the_plot_show_every_policy(outcomes: dict[str, Outcome]) -> None:
    """Each policy has its row in the table and its label in the plot, which is sound XML."""
    result = Result(
        trace="a<b",
        utilization=0.8,
        capacity_per_s=1.0,
        scenario=Scenario(speeds=(1.0,)),
        outcomes=outcomes,
    )
    text, shown = table(result), drawn([result, result])
    ET.fromstring(shown)  # noqa: S314 - our own text
    assert all(f"| {name} |" in text and shown.count(f">{name}<") == 2 for name in NAMES)


def test_azures_format(tmp_path: Path) -> None:
    """A CSV of token counts is read with prompts that share nothing, from time 0 on."""
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:04.5319600,600,8\n"
        "2023-11-16 18:17:04.0319600,3,0\n"
    )
    assert [arrival._replace(at_s=round(arrival.at_s, 3)) for arrival in load(path)] == [
        Arrival(0.0, 3, 1, (2,)),
        Arrival(0.5, 600, 8, (0, 1)),
    ]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One command compares, prints a table, and writes figures and plot."""
    trace, out = tmp_path / "small.jsonl", tmp_path / "out" / "routing.json"
    trace.write_text(text_of(generated(40, seed=2)))
    given = ["--replicas", "4", "--proxies", "2", "--policy", "random", "--unknown-speeds"]
    assert main([str(trace), "--workers", "1", "--out", str(out), *given]) == 0
    printed = capsys.readouterr().out
    assert "small.jsonl: 4 replicas (speeds unknown), 2 proxies, 80% of" in printed
    assert '"ttft_p99_s"' in out.read_text()
    assert out.with_suffix(".svg").read_text().startswith("<svg")


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    """A file without requests is named, with what it should hold."""
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="has no requests: give a trace"):
        load(path)
