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
    # a batch
    "release keeps the cost": ("lib/accounts", "cost + tokens", "cost"),
    "release keeps the count": ("lib/apply", "account, -1, -held", "account, 0, -held"),
    "a known request gets a second place": (
        "lib/apply",
        "verb == 'A' and account and not",
        "false and account and not",
    ),
    "a batch does not see what it did": (
        "lib/accounts",
        "places[account], touched[touches] = place, account",
        "touched[touches] = account",
    ),
    "a choice overlooks what was charged": (
        "lib/choice",
        "for index = noted + 1, #touched do",
        "for index = 1, 0 do",
    ),
    "a choice takes what has a higher score by now": (
        "lib/choice",
        "stale or places[ties[tied]] ~= lowest",
        "stale",
    ),
    "a lower score that was not read is overlooked": (
        "lib/choice",
        "and not (limit and lowest <= limit) and page()",
        "and tied == 0 and page()",
    ),
    "exclusions are ignored": (
        "lib/choice",
        "and not (excluded and excluded[names[account]])",
        "",
    ),
    "exclusions are ignored among the unnamed": (
        "lib/choice",
        "while excluded and fresh[from] and excluded[names[fresh[from]]] do",
        "while false do",
    ),
    "exclusions outlive their request": ("lib/choice", "stale = excluded ~= nil", "stale = false"),
    "a full replica is chosen": ("lib/choice", ">= 4e15", ">= 9e15"),
    "the cap is one too high": ("lib/score", "requests >= rate.cap", "requests > rate.cap"),
    "throughput is ignored": ("lib/score", "cost * rate.inverse", "cost * 1000"),
    "penalty is ignored": ("lib/score", "+ rate.penalty", ""),
    "hostile cost is not clamped": (
        "lib/operations",
        "whole(argv[at + 2], 1, 0, 1e9)",
        "tonumber(argv[at + 2]) or 1",
    ),
    "an adopted request is not moved": (
        "lib/apply",
        "names[account] ~= rids[index] or held[first] ~= price",
        "false",
    ),
    "the model's cap is ignored": ("lib/choice", "full(max_requests)", "false"),
    "affinity has no bound": ("lib/prefer", "done < least", "done < math.huge"),
    "affinity ignores the cost there": (
        "lib/prefer",
        "place + there[rid] * book.rated(account).inverse",
        "place",
    ),
    "affinity ignores the cost elsewhere": (
        "lib/prefer",
        "bound + batch.costs[index] * book.rated(idlest).inverse",
        "bound",
    ),
    "a candidate is charged the cost elsewhere": (
        "lib/apply",
        "there[index] and there[index][answer] or price",
        "price",
    ),
    "what a request holds is not written": ("lib/hold", "if count > 0 then", "if false then"),
    "the model's total is not written": (
        "lib/accounts",
        "'*', format('%d', total), unpack",
        "'*', '0', unpack",
    ),
    "ties go to a worse replica": (
        "lib/choice",
        "if place and place <= least then",
        "if place and place + 1e6 <= least then",
    ),
    "a holder is not put into px": ("ledger/hot", "and not known then", "and false then"),
    # a small batch
    "alone, a release keeps the cost": ("lib/post", "cost - off", "cost"),
    "alone, a release keeps the count": ("lib/post", "requests - 1", "requests"),
    "alone, a known request gets a second place": (
        "lib/one",
        "    if rid then\n      return rid",
        "    if false then\n      return rid",
    ),
    "alone, a new cost comes on top": ("lib/one", "rid, tokens, price", "rid, nil, price"),
    "alone, a full replica is chosen": ("lib/seat", ">= 4e15", ">= 9e15"),
    "alone, the model's cap is ignored": ("lib/post", "total >= cap", "false"),
    "alone, the model's total is not written": (
        "lib/post",
        "'*', format('%d', total), rid",
        "'*', '0', rid",
    ),
    "alone, hostile cost is not clamped": (
        "lib/sooner",
        "whole(argv[at + 2], 1, 0, 1e9)",
        "tonumber(argv[at + 2]) or 1",
    ),
    "alone, affinity has no bound": ("lib/sooner", "done < least", "done < math.huge"),
    "alone, affinity ignores the cost there": (
        "lib/sooner",
        "place + prices[rids[index]] * rates(weights[index + 1], known).inverse",
        "place",
    ),
    "alone, affinity ignores the cost elsewhere": (
        "lib/sooner",
        " + cost * rates(weights[1], known).inverse",
        "",
    ),
    "alone, a candidate is charged the cost elsewhere": (
        "lib/sooner",
        "best, prices[best] or cost",
        "best, cost",
    ),
    "alone, an adopted request is not moved": (
        "lib/one",
        "elseif rid == wanted then",
        "elseif rid then",
    ),
    "alone, what moves stays counted where it was": (
        "lib/one",
        "    if rid then\n      post",
        "    if rid and not price then\n      post",
    ),
    "alone, a holder is not put into px": ("lib/one", "if not known then", "if false then"),
    # others
    "reap leaves the totals": ("ledger/reap", "book.settle()\n", ""),
    "reap takes a living proxy": ("ledger/reap", "if beat and beat", "if not beat and beat"),
    "reap counts twice": ("ledger/reap", "at[rid], -1, -cost", "at[rid], -2, -cost"),
    "reap has no limit": ("ledger/reap", "whole(ARGV[3], 100, 1, 1000)", "1000"),
    "reap forgets too early": ("ledger/reap", "if left == 0 then", "if true then"),
    "a replica that left READY stays": ("lib/enter", "redis.call('ZREM', keys.ready, rid)", ""),
    "a returning replica counts as idle": (
        "lib/enter",
        "score(cost, requests, rates",
        "score(0, 0, rates",
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
