"""The soak's own rules: which faults come when, and what a killed proxy excuses."""

from itertools import islice
from typing import Any

import pytest

from tests.support.nemesis import TAKES, Nemesis
from tests.support.soaking import FELT_S, Kill, lost, rounds
from tests.support.streams import Phase, Result
from tests.support.verdicts import Outcome


def drawn(seed: int, count: int = 400) -> list[tuple[str, ...]]:
    """Give the kinds of the first rounds."""
    return [chosen.kinds for chosen in islice(rounds(TAKES, seed), count)]


def test_a_seed_says_which_faults_come_when() -> None:
    """The same seed gives the same rounds to the last digit, another one others."""
    assert list(islice(rounds(TAKES, 7), 50)) == list(islice(rounds(TAKES, 7), 50))
    assert drawn(7) != drawn(8)


@pytest.mark.parametrize("seed", range(5))
def test_every_kind_comes_before_one_comes_again(seed: int) -> None:
    """Kinds are drawn from a bag that holds each once."""
    kinds = [kind for pair in drawn(seed) for kind in pair]
    for first in range(0, len(kinds) - len(TAKES), len(TAKES)):
        assert set(kinds[first : first + len(TAKES)]) == TAKES.keys()


@pytest.mark.parametrize("seed", range(5))
def test_two_faults_overlap_now_and_then(seed: int) -> None:
    """A part of the rounds has two faults, of kinds that do not take the same for themselves."""
    pairs = [pair for pair in drawn(seed) if len(pair) > 1]
    assert 60 < len(pairs) < 200
    assert all(len(pair) == 2 and not TAKES[pair[0]] & TAKES[pair[1]] for pair in pairs)
    assert len(set(pairs)) > 50


def test_every_kind_can_be_aimed() -> None:
    """The table of kinds and the acts that bring them about are the same."""
    assert all(callable(getattr(Nemesis, f"_{kind}")) for kind in TAKES)


def result(**fields: Any) -> Result:  # noqa: ANN401 - fields of the struct
    """Make a stream that was cut when the proxy on port 1 was killed."""
    values: dict[str, Any] = {
        "outcome": Outcome.RESET,
        "phase": Phase.MIDWAY,
        "port": 1,
        "tries": 1,
        "ttft_s": 0.1,
        "total_s": 2.0,
        "ended_s": 10.5,
    }
    return Result(**{**values, **fields})


KILL = Kill(port=1, at_s=10.0, gone_s=10.4, asked=2)


@pytest.mark.parametrize(
    ("fields", "excused"),
    [
        ({}, True),
        ({"outcome": Outcome.OK}, True),
        ({"ended_s": 10.0}, True),
        ({"ended_s": 10.4 + FELT_S}, True),
        ({"ended_s": 9.99}, False),
        ({"ended_s": 10.41 + FELT_S}, False),
        ({"port": 2}, False),
        ({"phase": Phase.BEFORE}, False),
        ({"outcome": Outcome.ERROR_EVENT}, False),
        ({"outcome": Outcome.TRUNCATED}, False),
        ({"outcome": Outcome.DIFFERENT}, False),
    ],
)
def test_a_kill_excuses_what_it_cut_and_nothing_else(fields: dict[str, Any], excused: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """Begun streams of that proxy whose connection ended with its process, and no others."""
    one = result(**fields)
    assert lost([one], [KILL]) == ([] if excused else [one])
    assert lost([one], []) == ([] if one.outcome is Outcome.OK else [one])


def test_a_kill_excuses_no_more_than_it_had() -> None:
    """Of three resets when two requests were in flight, one has another cause."""
    three = [result(tries=number) for number in (1, 2, 3)]
    assert lost(three, [KILL]) == three[2:]
    later = Kill(port=1, at_s=10.2, gone_s=10.6, asked=1)
    assert lost(three, [KILL, later]) == []
    assert lost(three, [KILL, later, Kill(port=2, at_s=0, gone_s=99, asked=9)]) == []
