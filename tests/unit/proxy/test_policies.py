"""Prefix affinity: what begins alike goes to the same place, whoever sends it."""

import json
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.proxy.policies import affinity, homes
from services.proxy.policies.affinity import MEMORY, WIDESPREAD, Affinity, Offer
from services.proxy.policies.digests import CUTS, FIRST_CUT_BYTES, NO_PREFIX, prefix_of
from services.proxy.policies.homes import HOMES, Homes

FLEET = {f"m-{number:04d}": 1.0 for number in range(16)}


def conversation(seed: int, turns: int, turn_bytes: int = 3000) -> bytes:
    """Write the messages of a conversation; more turns of the same seed begin alike."""
    source = random.Random(seed)
    messages = [
        {"role": ("user", "assistant")[turn % 2], "content": source.randbytes(turn_bytes).hex()}
        for turn in range(turns)
    ]
    return json.dumps(messages).encode()


@given(st.binary(max_size=20_000), st.binary(max_size=4000), st.binary(max_size=4000))
@settings(max_examples=60, deadline=None)
def test_what_begins_alike_has_digests_alike(begin: bytes, one: bytes, other: bytes) -> None:
    """Two prompts share every digest within their common beginning, and none beyond it."""
    first, second = prefix_of(begin + one).digests, prefix_of(begin + other).digests
    whole = zip(begin + one, begin + other, strict=False)
    shortest = len(begin) + min(len(one), len(other))
    common = next((n for n, (a, b) in enumerate(whole) if a != b), shortest)
    alike = sum(cut <= common for cut in CUTS)
    assert first[:alike] == second[:alike]
    assert set(first[alike:]).isdisjoint(second[alike:])


def test_digests_are_the_same_in_every_process() -> None:
    """A digest depends on the bytes alone: other proxies, and later ones, compute the same."""
    assert prefix_of(b"a" * 1300).digests == (133502987840, 248408311297)


def test_what_stands_before_the_prompt_counts() -> None:
    """The same messages with other tools begin differently for the engine."""
    prompt = b"x" * 5000
    with_tools = prefix_of(prompt, b'[{"type":"function"}]')
    assert set(with_tools.digests).isdisjoint(prefix_of(prompt).digests)


def test_short_prompts_have_no_digests_and_long_ones_few() -> None:
    """Work is bounded: nothing below a KB, some twenty digests for 100 KB, and an end at a MB."""
    assert prefix_of(b"x" * (FIRST_CUT_BYTES - 1)) == NO_PREFIX
    assert len(prefix_of(b"x" * 100_000).digests) <= 22
    assert len(prefix_of(b"x" * 10_000_000).digests) == len(CUTS) <= 33


def test_proxies_agree_on_homes() -> None:
    """Whatever came and went before, and in whatever order: the same replicas, the same homes."""
    one, other = Homes(), Homes()
    one.update(FLEET)
    other.update(dict.fromkeys(list(FLEET)[:3], 1.0))
    digests = range(0, 1 << 36, 7_654_321)
    for digest in digests:
        other.of(digest)  # so that it has something to forget
    other.update({"m-gone": 3.0, **dict.fromkeys(list(FLEET)[::-1], 1.0)})
    for digest in digests:
        other.of(digest)
    other.update(dict(reversed(FLEET.items())))
    assert all(list(one.of(digest)) == list(other.of(digest)) for digest in digests)


def test_a_replica_that_leaves_takes_only_its_own_slots_along() -> None:
    """Where the leaver was not at home nothing changes; where it was first, the second follows."""
    table = Homes()
    table.update(FLEET)
    digests = range(0, 1 << 36, 7_654_321)
    before = {digest: list(table.of(digest)) for digest in digests}
    table.update({rid: capacity for rid, capacity in FLEET.items() if rid != "m-0003"})
    for digest, old in before.items():
        new = list(table.of(digest))
        assert new[: len(old) - 1] == [rid for rid in old if rid != "m-0003"][: len(old) - 1]
    table.update(FLEET)
    assert {digest: list(table.of(digest)) for digest in digests} == before


def test_homes_follow_capacity() -> None:
    """A replica of capacity 2 is home to about twice as many prompts."""
    table = Homes()
    table.update({"a": 1.0, "b": 2.0, "c": 1.0})
    slots = range(0, 1 << 36, (1 << 36) // 4000 + 1)
    counts = Counter(table.of(digest)[0] for digest in slots)
    assert 1.7 < counts["b"] / counts["a"] < 2.3
    assert 1.7 < counts["b"] / counts["c"] < 2.3


def test_homes_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1,000 replicas a slot is ranked once; a replica that comes is one weighing a slot."""
    ranked: list[int] = []
    weighed: list[int] = []
    rank: Any = vars(Homes)["_ranked"]
    weigh: Any = vars(homes)["_weight"]

    def ranking(table: Homes, number: int) -> object:
        ranked.append(number)
        return rank(table, number)

    def weighing(draw: int, capacity: float) -> object:
        weighed.append(draw)
        return weigh(draw, capacity)

    monkeypatch.setattr(Homes, "_ranked", ranking)
    monkeypatch.setattr(homes, "_weight", weighing)
    table = Homes()
    fleet = {f"m-{number}": 1.0 for number in range(1000)}
    table.update(fleet)
    for _ in range(3):
        table.of(12345)
    assert (len(ranked), len(weighed)) == (1, HOMES)
    table.update({**fleet, "new": 1.0})
    assert len(table.of(12345)) == HOMES
    assert (len(ranked), len(weighed)) == (1, HOMES + 1)
    other = next(rid for rid in fleet if rid not in table.of(12345))
    table.update({rid: 1.0 for rid in fleet if rid != other})
    table.of(12345)
    assert len(ranked) == 1


def test_homes_are_spread_evenly() -> None:
    """Among equal replicas each is home to about as many prompts as the others."""
    table = Homes()
    table.update(FLEET)
    slots = range(0, 1 << 36, (1 << 36) // 8000 + 1)
    counts = Counter(table.of(digest)[0] for digest in slots)
    mean = sum(counts.values()) / len(FLEET)
    assert len(counts) == len(FLEET)
    assert max(counts.values()) < 1.5 * mean


def test_a_conversation_stays_where_it_is() -> None:
    """The next turn's first candidate is the replica of the last, at the cost of what is new."""
    proxy = Affinity()
    proxy.update(FLEET)
    first, second = prefix_of(conversation(1, 3)), prefix_of(conversation(1, 5))
    proxy.placed(first, "m-0007")
    offer = proxy.offer(second, second.size_bytes // 4, 100)
    rid, cost = offer.candidates[0]
    assert rid == "m-0007"
    assert offer.cost_tokens == second.size_bytes // 4 + 100
    new_tokens = (second.size_bytes - first.size_bytes) // 4 + 100
    assert new_tokens <= cost <= new_tokens + first.size_bytes // 16


def test_proxies_send_what_they_do_not_know_to_the_same_home() -> None:
    """Two proxies without a memory of a conversation name the same candidates."""
    one, other = Affinity(), Affinity()
    one.update(FLEET)
    other.update(FLEET)
    prefix = prefix_of(conversation(2, 4))
    offer = one.offer(prefix, 6000, 10)
    assert offer.candidates
    assert offer == other.offer(prefix, 6000, 10)


def test_a_widespread_prefix_draws_to_no_replica() -> None:
    """What many replicas hold is no reason to prefer one, and costs nowhere."""
    proxy = Affinity()
    proxy.update(FLEET)
    system = b"s" * 4096
    for number in range(WIDESPREAD):
        proxy.placed(prefix_of(system + conversation(number, 2)), f"m-{number:04d}")
    new = prefix_of(system + conversation(99, 2))
    offer = proxy.offer(new, new.size_bytes // 4, 0)
    assert offer.cost_tokens <= (new.size_bytes - 3500) // 4
    assert {rid for rid, _ in offer.candidates} == set(proxy.homes.of(_first_beyond(new, 4096)))


def _first_beyond(prefix: affinity.Prefix, size_bytes: int) -> int:
    return prefix.digests[sum(cut <= size_bytes for cut in CUTS)]


def test_what_a_home_may_hold_is_learned() -> None:
    """Where conversations go on, a home is expected to hold a part; where nothing recurs, none."""
    proxy = Affinity()
    proxy.update(FLEET)
    unseen = prefix_of(conversation(5000, 4))
    for seed in range(100):
        for turns in (1, 3):
            prefix = prefix_of(conversation(seed, turns))
            proxy.offer(prefix, 5000, 0)
            proxy.placed(prefix, "m-0001")
    offer = proxy.offer(unseen, 6000, 0)
    assert 0.2 < proxy.expected_share <= affinity.MOST
    assert all(cost < 0.8 * offer.cost_tokens for _, cost in offer.candidates)
    for seed in range(1000, 1400):
        proxy.offer(prefix_of(conversation(seed, 1)), 1500, 0)
    assert proxy.expected_share < 0.01
    offer = proxy.offer(unseen, 6000, 0)
    assert all(cost > 0.98 * offer.cost_tokens for _, cost in offer.candidates)


def test_a_replica_that_left_is_no_candidate() -> None:
    """What was sent to a replica that is no longer READY is forgotten for as long."""
    proxy = Affinity()
    proxy.update(FLEET)
    prefix = prefix_of(conversation(3, 3))
    proxy.placed(prefix, "m-0001")
    proxy.update({rid: 1.0 for rid in FLEET if rid != "m-0001"})
    assert "m-0001" not in dict(proxy.offer(prefix, 5000, 0).candidates)
    proxy.update(FLEET)
    assert proxy.offer(prefix, 5000, 0).candidates[0][0] == "m-0001"


def test_nothing_to_choose_is_nothing_to_prefer() -> None:
    """With one replica, with affinity off, or with a short prompt the offer is a plain cost."""
    proxy = Affinity()
    prefix = prefix_of(conversation(4, 3))
    assert proxy.offer(prefix, 50, 7) == Offer(57)
    proxy.update({"m-0001": 1.0})
    assert proxy.offer(prefix, 50, 7) == Offer(57)
    proxy.update(FLEET)
    assert proxy.offer(NO_PREFIX, 50, 7) == Offer(57)


def test_memory_is_bounded() -> None:
    """However many prompts come, a proxy remembers the latest digests only, the last used first."""
    proxy = Affinity()
    proxy.update(FLEET)
    kept = prefix_of(b"k" * 2000)
    for number in range(MEMORY):
        if number % 1000 == 0:
            proxy.placed(kept, "m-0001")
        proxy.placed(prefix_of(b"%040d" % number * 30), "m-0002")
    assert proxy.remembered == MEMORY
    assert proxy.offer(kept, 500, 0).candidates[0][0] == "m-0001"
    assert proxy.offer(prefix_of(b"%040d" % 0 * 30), 300, 0).candidates[0][0] != "m-0002"


@given(st.integers(0, 1 << 30), st.integers(1, 40), st.integers(0, 4000))
@settings(max_examples=40, deadline=None)
def test_an_offer_makes_sense(seed: int, steps: int, further: int) -> None:
    """Candidates are READY, named once, at most a few, and cost from `further` up to elsewhere."""
    source = random.Random(seed)
    proxy = Affinity()
    for _ in range(steps):
        ready = source.sample(sorted(FLEET), source.randrange(0, 6))
        proxy.update({rid: source.choice((0.5, 1.0, 2.0)) for rid in ready})
        prefix = prefix_of(conversation(source.randrange(4), source.randrange(1, 6)))
        tokens = source.randrange(1, 50_000)
        offer = proxy.offer(prefix, tokens, further)
        names = [rid for rid, _ in offer.candidates]
        assert len(set(names)) == len(names) <= affinity.CANDIDATES
        assert set(names) <= set(ready)
        assert all(further <= cost <= offer.cost_tokens for _, cost in offer.candidates)
        assert offer.cost_tokens <= tokens + further
        if ready:
            proxy.placed(prefix, source.choice(ready))
