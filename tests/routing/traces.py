"""Request traces: what arrives when, with which prompt, and how long the answer is.

Two formats are read. JSON lines as Mooncake publishes them (`timestamp` in ms, `input_length`,
`output_length`, `hash_ids`: an id for each 512 tokens of the prompt, equal leading ids for equal
leading text). And Azure's CSV (`TIMESTAMP, ContextTokens, GeneratedTokens`), whose prompts share
nothing. `generated` makes a small trace of the first format from a seed.
"""

import csv
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

BLOCK_TOKENS: Final = 512
SAMPLE: Final = Path(__file__).with_name("sample.jsonl")


class Arrival(NamedTuple):
    """One request."""

    at_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    """Names of the prompt's blocks; the last one may be a part of a block."""


def load(path: Path) -> list[Arrival]:
    """Read a trace of either format, by the file's suffix; the first request comes at 0."""
    read = _csv if path.suffix == ".csv" else _json_lines
    arrivals = sorted(read(path), key=lambda arrival: arrival.at_s)
    if not arrivals:
        raise ValueError(f"{path} has no requests: give a trace in Mooncake's or Azure's format")
    first_s = arrivals[0].at_s
    return [arrival._replace(at_s=arrival.at_s - first_s) for arrival in arrivals]


def _json_lines(path: Path) -> Iterable[Arrival]:
    with path.open() as lines:
        for line in lines:
            record = json.loads(line)
            blocks = tuple(record["hash_ids"])
            most_tokens = len(blocks) * BLOCK_TOKENS
            yield Arrival(
                record["timestamp"] / 1000,
                max(1, min(record["input_length"], most_tokens)),
                max(1, record["output_length"]),
                blocks,
            )


def _csv(path: Path) -> Iterable[Arrival]:
    with path.open(newline="") as lines:
        fresh = 0
        for row in csv.DictReader(lines):
            tokens = max(1, int(row["ContextTokens"]))
            count = -(-tokens // BLOCK_TOKENS)
            # Seven digits of a second's fraction are one more than Python reads.
            at = datetime.fromisoformat(row["TIMESTAMP"][:26])
            yield Arrival(
                at.timestamp(),
                tokens,
                max(1, int(row["GeneratedTokens"])),
                tuple(range(fresh, fresh + count)),
            )
            fresh += count


def rate_per_s(arrivals: list[Arrival]) -> float:
    """Return how many requests arrive per second on average."""
    return (len(arrivals) - 1) / max(1e-9, arrivals[-1].at_s)


def steady(arrivals: list[Arrival], random: Random) -> list[Arrival]:
    """Keep what arrives and its order, but as a Poisson process over the same time."""
    mean_s = arrivals[-1].at_s / max(1, len(arrivals) - 1)
    now_s = 0.0
    again: list[Arrival] = []
    for arrival in arrivals:
        again.append(arrival._replace(at_s=now_s))
        now_s += random.expovariate(1 / mean_s)
    return again


def generated(count: int, seed: int) -> list[Arrival]:
    """Make conversations of several turns: some begin with a long system prompt that many share.

    A turn repeats the conversation so far and adds to it, as chat clients do.
    """
    random = Random(seed)
    fresh = iter(range(1_000_000))
    systems = [tuple(next(fresh) for _ in range(blocks)) for blocks in (2, 4, 8)]
    arrivals: list[Arrival] = []
    began_s = 0.0
    while len(arrivals) < count:
        began_s += random.expovariate(1.0)
        blocks = random.choice((*systems, (), (), ()))
        blocks = (*blocks, *(next(fresh) for _ in range(1 + int(random.expovariate(1 / 6)))))
        at_s = began_s
        for _ in range(1 + int(random.expovariate(1 / 2.5))):
            output = min(800, 4 + int(random.expovariate(1 / 120)))
            tokens = len(blocks) * BLOCK_TOKENS - random.randrange(BLOCK_TOKENS)
            tail = (*blocks[:-1], next(fresh))
            arrivals.append(Arrival(round(at_s, 3), tokens, output, tail))
            blocks = (*blocks, *(next(fresh) for _ in range(1 + int(random.expovariate(1.0)))))
            at_s += 4 + random.expovariate(1 / 20)
    arrivals.sort()
    first_s = arrivals[0].at_s
    return [one._replace(at_s=round(one.at_s - first_s, 3)) for one in arrivals[:count]]


def text_of(arrivals: Iterable[Arrival]) -> str:
    """Write a trace as JSON lines."""
    return "".join(
        json.dumps(
            {
                "timestamp": round(arrival.at_s * 1000),
                "input_length": arrival.input_tokens,
                "output_length": arrival.output_tokens,
                "hash_ids": arrival.blocks,
            },
            separators=(",", ":"),
        )
        + "\n"
        for arrival in arrivals
    )
