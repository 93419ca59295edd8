"""A proxy sends a prompt where its beginning is: from the request's bytes to the ledger's books."""

from services.proxy.policies.affinity import Affinity
from services.proxy.policies.digests import prefix_of
from shared.models.replica import ReplicaState
from tests.support.waiting import wait_until
from tests.unit.proxy.engine import Engine
from tests.unit.proxy.rig import Rig, replica

LONG = "The mesh is told a long story. " * 200


def turns(*texts: str) -> list[dict[str, str]]:
    """Make the messages of a conversation."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


async def test_the_next_turn_prefers_the_replica_of_the_last() -> None:
    """The second turn's reserve names the first one's replica, where it costs what is new."""
    async with Engine() as one, Engine() as two, Engine() as three, Rig(one, two, three) as rig:
        await rig.chat(messages=turns(LONG), max_tokens=8)
        await wait_until(rig.idle)
        first = rig.ledger.reserves()[-1]
        served_by = next(e for e in (one, two, three) if e.seen)
        rid = rig.replicas[(one, two, three).index(served_by)].rid
        await rig.chat(messages=turns(LONG, "Aha.", "Go on."), max_tokens=8)
        await wait_until(rig.idle)
        second = rig.ledger.reserves()[-1]
        assert second.affinity[0][0] == rid
        assert second.cost_on(rid) < first.cost_tokens / 2 < second.cost_tokens
        assert second.cost_on("elsewhere") == second.cost_tokens


async def test_the_ledger_and_the_proxy_agree_on_the_cost() -> None:
    """What a proxy believes that a request holds is what the ledger charged for it."""
    async with Engine() as one, Engine() as two, Rig(one, two) as rig:
        prefix = prefix_of(LONG.encode())
        rig.served.affinity.placed(prefix, "demo-1")
        offer = rig.served.affinity.offer(prefix, 1500, 8)
        assert dict(offer.candidates)["demo-1"] < offer.cost_tokens
        answers: list[str] = []
        for request in ("a", "b"):
            rig.served.reservations.reserve(
                request, offer.cost_tokens, (), answers.append, offer.candidates
            )
        await wait_until(lambda: len(answers) == 2)
        for request in ("a", "b"):
            holding = rig.served.reservations.live.get(request)
            assert holding is not None
            assert holding.cost_tokens == rig.ledger.held[request].cost_tokens
            assert holding.cost_tokens == dict(offer.candidates)[holding.rid]
            rig.served.reservations.release(request)
        await wait_until(rig.idle)


async def test_short_prompts_carry_no_candidates() -> None:
    """A prompt below a KB is reserved as ever: nothing is worth remembering of it."""
    async with Engine() as one, Engine() as two, Rig(one, two) as rig:
        for _ in range(2):
            await rig.chat()
        await wait_until(rig.idle)
        assert all(op.affinity == () for op in rig.ledger.reserves())


async def test_affinity_can_be_switched_off() -> None:
    """With `prefix_affinity` off in the model's spec no reserve names a candidate."""
    spec = {"prefix_affinity": False}
    async with Engine() as one, Engine() as two, Rig(one, two, spec=spec) as rig:
        for _ in range(2):
            await rig.chat(messages=turns(LONG))
        await wait_until(rig.idle)
        assert all(op.affinity == () for op in rig.ledger.reserves())


async def test_a_replica_that_leaves_ready_is_no_candidate() -> None:
    """The table decides who can be preferred: a replica that drains is not named any more."""
    async with Engine() as one, Engine() as two, Engine() as three, Rig(one, two, three) as rig:
        prefix = prefix_of(LONG.encode())
        rig.served.affinity.placed(prefix, "demo-2")
        assert rig.served.affinity.offer(prefix, 1500, 8).candidates[0][0] == "demo-2"
        gone = replica("demo-2", three.url, state=ReplicaState.DRAINING)
        rig.change(rig.replicas[0], rig.replicas[1], gone)
        named = dict(rig.served.affinity.offer(prefix, 1500, 8).candidates)
        assert named
        assert "demo-2" not in named


async def test_peers_agree_on_a_prompt_that_neither_has_seen() -> None:
    """A proxy that never saw a conversation prefers the same homes as every other proxy."""
    async with Engine() as one, Engine() as two, Engine() as three, Rig(one, two, three) as rig:
        await rig.chat(messages=turns(LONG), max_tokens=8)
        await wait_until(rig.idle)
        op = rig.ledger.reserves()[0]
        peer = Affinity()
        peer.update({one.rid: one.capacity for one in rig.replicas})
        sent = next(e for e in (one, two, three) if e.seen).seen[0]
        raw = sent.body[sent.body.index(b"[") : sent.body.rindex(b"]") + 1]
        assert [rid for rid, _ in peer.offer(prefix_of(raw), 1, 0).candidates] == [
            rid for rid, _ in op.affinity
        ]
