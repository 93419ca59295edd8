"""Errors made on purpose, one at a time: in a script's source, or in a function of the real code.

Each must make the simulation fail; a simulation that an error passes proves nothing about it.
"""

import importlib
import inspect
import shutil
import textwrap
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from shared.registry.loader import ScriptLibrary, scripts_folder


class Mutation(NamedTuple):
    """Where `old` stands (a script's part, or `module:Class.function`) and what replaces it."""

    place: str
    old: str
    new: str
    theme: str = ""
    """Kind of faults under which it shows, so that few histories suffice."""
    seed: int = 0
    """A history that shows it: where the search begins."""


LEDGER = {
    # the scripts
    "release keeps the count": Mutation("lib/apply", "account, -1, -held", "account, 0, -held"),
    "release gives back twice": Mutation(
        "lib/apply", "account, -1, -held", "account, -2, -2 * held"
    ),
    "release keeps the cost": Mutation("lib/accounts", "cost + tokens", "cost"),
    "what moves stays counted where it was": Mutation(
        "lib/one",
        "    if rid then\n      post",
        "    if rid and not price then\n      post",
        theme="slowness",
        seed=5,
    ),
    "adopt does not reprice": Mutation(
        "lib/one", "rid == wanted and tokens == price", "rid == wanted"
    ),
    "totals are not written": Mutation("lib/accounts", "if total > 0 then", "if false then"),
    "the cap is one too high": Mutation("lib/score", "requests >= rate.cap", "requests > rate.cap"),
    "a returning replica counts as idle": Mutation(
        "lib/enter", "score(cost, requests, rates", "score(0, 0, rates", theme="fleet, data"
    ),
    "silence needs no mark": Mutation(
        "ledger/suspects",
        "elseif marked <= now - grace then",
        "end\n  if true then",
        theme="server, clock",
        seed=8,
    ),
    "times in the future stay": Mutation(
        "ledger/suspects",
        "for _, key in ipairs({ px, suspect }) do",
        "for _, key in ipairs({}) do",
        theme="proxies, clock",
        seed=4,
    ),
    "a beating proxy is reaped": Mutation(
        "ledger/reap", "if beat and beat >=", "if beat and 0 >", theme="proxies", seed=7
    ),
    "reaping leaves the totals": Mutation("ledger/reap", "book.settle()\n", "", theme="proxies"),
    "reaping counts twice": Mutation(
        "ledger/reap", "at[rid], -1, -cost", "at[rid], -2, -cost", theme="proxies"
    ),
    "a version follows the clock alone": Mutation(
        "lib/next_version",
        "math.max(whole(text, 0, 0, 9e15) + 1, now)",
        "now",
        theme="fleet, clock",
        seed=2,
    ),
    "a version follows its predecessor alone": Mutation(
        "lib/next_version",
        "math.max(whole(text, 0, 0, 9e15) + 1, now)",
        "whole(text, 0, 0, 9e15) + 1",
        theme="fleet, data",
    ),
    "adopt does not move": Mutation(
        "lib/one",
        "local rid, tokens = lease_of(text)",
        "local rid, tokens = lease_of(text)\n  wanted = verb == 'D' and rid or wanted",
        theme="slowness",
        seed=7,
    ),
    "alone, a release keeps the count": Mutation("lib/post", "requests - 1", "requests"),
    "alone, a release keeps the cost": Mutation("lib/post", "cost - off", "cost"),
    "alone, a new cost comes on top": Mutation("lib/one", "rid, tokens, price", "rid, nil, price"),
    "alone, totals are not written": Mutation(
        "lib/post", "'*', format('%d', total), rid", "'*', '0', rid"
    ),
    "a holder is not put into px": Mutation(
        "lib/one", "if not known then", "if false then", theme="proxies, data"
    ),
    # the proxy
    "lost operations leave nothing to compare": Mutation(
        "services.proxy.beats:Beats._keep_true",
        "if reservations.dirty:",
        "if False:",
        theme="losses",
    ),
    "a comparison overlooks another replica": Mutation(
        "services.proxy.live:LiveRequests.compare",
        "lease.rid != holding.rid",
        "False",
        theme="losses",
        seed=79,
    ),
    "a comparison overlooks another cost": Mutation(
        "services.proxy.live:LiveRequests.compare",
        "lease.cost_tokens != holding.cost_tokens",
        "False",
        theme="losses",
    ),
    "deferred operations are lost": Mutation(
        "services.proxy.reservations:Reservations._landed",
        "if later:",
        "if False:",
        theme="network",
        seed=4,
    ),
    "a comparison keeps what is too much": Mutation(
        "services.proxy.live:LiveRequests.compare",
        "request not in self._by_id",
        "False",
        theme="network",
    ),
    "a count that differs is ignored": Mutation(
        "services.proxy.beats:Beats._keep_true", "or known_drift", "", theme="proxies, data", seed=5
    ),
    "a forgotten proxy adopts nothing": Mutation(
        "services.proxy.beats:Beats._keep_true",
        "or known_drift or forgotten",
        "or False",
        theme="proxies",
        seed=3,
    ),
    "nobody reaps": Mutation(
        "services.proxy.beats:Beats._keep_true", "if beat.silent:", "if 0:", theme="proxies"
    ),
    "a breaker never closes": Mutation(
        "services.proxy.breaker:RedisBreaker.fast_beat",
        "self.open, False",
        "self.open, self.open",
        theme="network",
    ),
    "a settled cost stays here": Mutation(
        "services.proxy.reservations:Reservations.settle", "self._tell(", "(lambda *_: None)("
    ),
}

LEADER = {
    # the scripts
    "the fence compares nothing": Mutation("lib/fenced", "if mine < highest or", "if false and"),
    "the fence is not raised": Mutation(
        "lib/fenced", "if mine > highest or not seen[2] then", "if false then"
    ),
    "the fleet's fence compares nothing": Mutation(
        "lib/outdated", "if number < last or", "if false and"
    ),
    "an epoch follows the clock alone": Mutation(
        "leader/lead",
        "next_version(last, math.max(now_ms(), whole(held[2], 0, 0, 9e15) + 1))",
        "now_ms() + 0 * next_version('0', 0)",
        seed=11,
    ),
    "each election has the last epoch": Mutation(
        "leader/lead",
        "last = digits(next_version(",
        "last = held[2] or last ~= '0' and last or digits(next_version(",
    ),
    "a lease never ends": Mutation(
        "leader/lead", "redis.call('PEXPIRE', leader, digits(ttl))\nret", "ret"
    ),
    "a lease is anybody's": Mutation(
        "leader/lead", "elseif held[1] and held[1] ~= owner then", "elseif false then"
    ),
    "a leader resigns for another": Mutation(
        "leader/lead", "elseif held[1] and held[1] ~= owner then", "elseif nil then"
    ),
    # the controller
    "a reign is counted from the answer": Mutation(
        "services.controller.leader:Leader.campaign",
        "self._acts_until_s = sent_s",
        "self._acts_until_s = self._clock.monotonic_s()",
        seed=6,
    ),
    "a leader acts to the end of the lease and beyond": Mutation(
        "services.controller.leader:Leader.campaign",
        "ACTING_SHARE * self._ttl_ms",
        "2 * self._ttl_ms",
    ),
    "a reign does not end by time": Mutation(
        "services.controller.leader:Leader.reign",
        "or self._clock.monotonic_s() >= self._acts_until_s",
        "",
    ),
    "a follower goes on acting": Mutation(
        "services.controller.leader:Leader.campaign",
        'self._end("another controller leads", owner=reply.owner)',
        "pass",
        seed=4,
    ),
    "fences are not raised first": Mutation(
        "services.controller.act:Actor.raise_fences", "for model in models:", "for model in ():"
    ),
}


@contextmanager
def mutated(mutation: Mutation, folder: Path) -> Generator[ScriptLibrary]:
    """Give the scripts, with the error in them or in the real code while this lasts."""
    if ":" not in mutation.place:
        root = folder / "lua"
        shutil.copytree(scripts_folder(), root)
        path = root / f"{mutation.place}.lua"
        path.write_text(_replaced(path.read_text(), mutation))
        yield ScriptLibrary.load(root)
        return
    module_name, _, qualified = mutation.place.partition(":")
    owner: Any = importlib.import_module(module_name)
    *classes, name = qualified.split(".")
    for each in classes:
        owner = getattr(owner, each)
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    found: dict[str, Any] = {}
    exec(_replaced(source, mutation), function.__globals__, found)  # noqa: S102 - the point of it
    with patch.object(owner, name, found[name]):
        yield ScriptLibrary.load()


def _replaced(text: str, mutation: Mutation) -> str:
    assert mutation.old in text, f"{mutation.place} does not contain {mutation.old!r} any more"
    return text.replace(mutation.old, mutation.new)
