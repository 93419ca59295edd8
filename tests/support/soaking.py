"""What a soak does and how it is judged: which faults come when, and which losses are excused.

Pure.

Faults are drawn from a bag that holds every kind once, so that each comes before any comes again;
now and then one of another sort strikes while the first is not over. All of it follows from a seed.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import msgspec

from tests.support.streams import Phase, Result
from tests.support.verdicts import Outcome

TWICE: Final = 0.35
"""Share of rounds with a second fault."""
GAP_S: Final = 3.0
"""Between the two of a round, at most."""
PAUSE_S: Final = (0.5, 2.5)
"""Between a mesh that is whole and the next fault. A stream survives three losses of its replica:
it may live through one round, and through the beginning of the next."""
FELT_S: Final = 1.0
"""After the end of a proxy's process its clients have lost their connections."""


class Round(msgspec.Struct, frozen=True):
    """One fault, or two of which the second strikes `gap_s` after the first."""

    kinds: tuple[str, ...]
    gap_s: float
    pause_s: float
    """How long the mesh is left alone before."""


class Kill(msgspec.Struct, frozen=True):
    """The end of one proxy by SIGKILL: the only fault that may cost its own streams."""

    port: int
    at_s: float
    gone_s: float
    """When its process was gone: a starved kernel needs its time."""
    asked: int
    """Requests that were in flight there."""


def rounds(kinds: Mapping[str, frozenset[str]], seed: int) -> Iterator[Round]:
    """Draw rounds for ever; two `kinds` that take the same for themselves never meet in one."""
    source = random.Random(seed)
    bag: list[str] = []
    while True:
        bag = bag or source.sample(sorted(kinds), len(kinds))
        names = [bag.pop()]
        fitting = [name for name in bag if not kinds[name] & kinds[names[0]]]
        if fitting and source.random() < TWICE:
            names.append(fitting[-1])
            bag.remove(fitting[-1])
        yield Round(tuple(names), source.uniform(0, GAP_S), source.uniform(*PAUSE_S))


def lost(results: Sequence[Result], kills: Sequence[Kill]) -> list[Result]:
    """Give the requests that nothing excuses.

    A kill excuses as many streams as were in flight at that proxy, if they had begun and their
    connection ended with its process. Nothing else excuses anything.
    """
    left = [kill.asked for kill in kills]
    found: list[Result] = []
    for result in results:
        if result.outcome is Outcome.OK:
            continue
        for number, kill in enumerate(kills):
            if left[number] and _cut_by(kill, result):
                left[number] -= 1
                break
        else:
            found.append(result)
    return found


def _cut_by(kill: Kill, result: Result) -> bool:
    return (
        result.outcome is Outcome.RESET
        and result.phase is Phase.MIDWAY
        and result.port == kill.port
        and kill.at_s <= result.ended_s <= kill.gone_s + FELT_S
    )
