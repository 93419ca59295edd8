"""The ledger against a Python model under random interleavings; proof that the check can fail."""

import shutil
from pathlib import Path

import pytest
import redis.asyncio

from shared.errors import RegistryError
from shared.registry import Registry
from shared.registry.connection import Connection
from shared.registry.loader import ScriptLibrary, scripts_folder
from tests.lua.exercise import lead
from tests.lua.interleaving import Interleaving
from tests.support.servers import RedisServer

pytestmark = pytest.mark.long

RUNS = {"redis": 80, "valkey": 60, "cluster": 60, "fake": 10}
"""Seeds per kind of server."""
STEPS = 120

MUTATIONS = {
    "release keeps the cost": ("lib/charge", "costs + cost", "costs"),
    "release keeps the count": ("ledger/hot", "rid, -1, -cost", "rid, 0, -cost"),
    "a known request gets a second place": (
        "ledger/hot",
        "verb == 'A' and rid and not",
        "false and rid and not",
    ),
    "a batch does not see what it did": (
        "lib/charge",
        "    book.places[account] = place",
        "    book.scores[account] = place",
    ),
    "a lower score that was not read is overlooked": (
        "lib/choose",
        "or not page(keys, book, 64)",
        "or count > 0 or not page(keys, book, 64)",
    ),
    "exclusions are ignored": ("lib/choose", "and not excluded[names[account]]", ""),
    "exclusions are ignored among the unnamed": (
        "lib/choose",
        "while fresh[from] and excluded[names[fresh[from]]] do",
        "while false do",
    ),
    "a full replica is chosen": ("lib/choose", ">= 4e15", ">= 9e15"),
    "the cap is one too high": ("lib/score", "requests >= rate.cap", "requests > rate.cap"),
    "throughput is ignored": ("lib/score", "cost * rate.inverse", "cost * 1000"),
    "penalty is ignored": ("lib/score", "+ rate.penalty", ""),
    "hostile cost is not clamped": (
        "lib/operations",
        "whole(argv[at + 2], 1, 0, 1e9)",
        "tonumber(argv[at + 2]) or 1",
    ),
    "an adopted request is not moved": (
        "ledger/hot",
        "rid == wanted and cost == operation.cost",
        "rid",
    ),
    "the model's cap is ignored": ("ledger/hot", "book.total >= max_requests", "false"),
    "affinity has no bound": ("lib/prefer", "done < least", "done < math.huge"),
    "affinity ignores the cost there": (
        "lib/prefer",
        "place + operation.costs[rid] * inverse",
        "place",
    ),
    "affinity ignores the cost elsewhere": (
        "lib/prefer",
        "bound + operation.cost * rates(book.weights[idlest], book.rates).inverse",
        "bound",
    ),
    "a candidate is charged the cost elsewhere": (
        "ledger/hot",
        "operation.costs[wanted] or operation.cost",
        "operation.cost",
    ),
    "reap leaves the totals": ("ledger/reap", "settle(keys, book)\n", ""),
    "reap takes a living proxy": ("ledger/reap", "if beat and beat", "if not beat and beat"),
    "reap counts twice": ("ledger/reap", "rid, -1, -cost", "rid, -2, -cost"),
    "reap has no limit": ("ledger/reap", "whole(ARGV[3], 100, 1, 1000)", "1000"),
    "reap forgets too early": ("ledger/reap", "if left == 0 then", "if true then"),
    "the model's total is not written": (
        "lib/settle",
        "keys.nreq, '*', digits(book.total)",
        "keys.nreq, '*', '0'",
    ),
    "a replica that left READY stays": ("lib/enter", "redis.call('ZREM', keys.ready, rid)", ""),
    "a returning replica counts as idle": (
        "lib/enter",
        "score(cost, requests, rates",
        "score(0, 0, rates",
    ),
    "ties go to a worse replica": (
        "lib/choose",
        "places[fresh[from]] < lowest then",
        "places[fresh[from]] + 1e6 < lowest then",
    ),
}


async def explore(registry: Registry, seeds: range, steps: int = STEPS) -> int:
    """Run some seeds; return how many batches were checked."""
    fence = await lead(registry)
    batches = 0
    for seed in seeds:
        run = Interleaving(registry, fence, f"m{seed}", seed)
        try:
            await run.run(steps)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, batch {run.count}: {error}") from error
        batches += run.count
    return batches


async def test_ledger_equals_model(door: Registry, kind: str) -> None:
    """After every step the ledger equals the sum of its leases, whatever came and however often."""
    batches = await explore(door, range(RUNS[kind]))
    assert batches > RUNS[kind] * STEPS // 2


@pytest.mark.parametrize("name", MUTATIONS)
async def test_model_check_finds_mutations(
    name: str, redis_server: RedisServer, registry: Registry, mutant: ScriptLibrary
) -> None:
    """Each of these errors in the scripts, made on purpose, fails the comparison."""
    client = redis.asyncio.Redis(port=redis_server.port, driver_info=None)
    connection = Connection(client, mutant)
    mutated = Registry.over(connection, registry.keys)
    try:
        with pytest.raises((AssertionError, RegistryError)):
            await explore(mutated, range(24))
    finally:
        await connection.aclose()


@pytest.fixture
def mutant(name: str, tmp_path: Path) -> ScriptLibrary:
    """Load the scripts with one error in them."""
    folder = tmp_path / "lua"
    shutil.copytree(scripts_folder(), folder)
    part, old, new = MUTATIONS[name]
    path = folder / f"{part}.lua"
    text = path.read_text()
    assert old in text, f"{part} does not contain {old!r} any more"
    path.write_text(text.replace(old, new))
    return ScriptLibrary.load(folder)
