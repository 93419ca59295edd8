"""Orders that parse and yet cannot be carried out: the replica fails, the agent goes on."""

from collections.abc import Callable

import msgspec
import pytest

from services.agent.probe import parse_load
from shared.models.deployment import EngineKind, EngineSpec
from shared.models.replica import ReplicaState
from tests.unit.agent.fleet import SIM, AgentProcess, Fleet, spec

VLLM = msgspec.structs.replace(SIM, kind=EngineKind.VLLM)
EXTERNAL = msgspec.structs.replace(SIM, kind=EngineKind.EXTERNAL, startup_timeout_s=1)


async def test_an_odd_order_ends_its_replica_and_not_the_agent(
    fleet: Fleet, start_agent: Callable[..., AgentProcess]
) -> None:
    """Paths, arguments and addresses that the system refuses fail their own replica alone."""
    agent = start_agent(engine_python="/bin/true")
    odd: list[tuple[EngineSpec, str]] = [
        (msgspec.structs.replace(SIM, args=("a\0b",)), ""),
        (msgspec.structs.replace(SIM, env={"A=B": "1"}), ""),
        (msgspec.structs.replace(VLLM, model="~no-such-user/weights"), ""),
        (msgspec.structs.replace(VLLM, model="/" + "w" * 300), ""),
        (EXTERNAL, "http://[bad"),
        (EXTERNAL, "http://127.0.0.1:99999"),
        (EXTERNAL, "http://a..b"),
    ]
    for number, (engine, url) in enumerate(odd):
        await fleet.create(f"odd-{number}", spec(engine), url=url)
    for number, (engine, _) in enumerate(odd):
        await fleet.becomes(f"odd-{number}", ReplicaState.FAILED)
        assert (await fleet.known(f"odd-{number}")).reason, engine
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", ReplicaState.READY)
    assert b"loop_failed" not in agent.log.read_bytes()


@pytest.mark.parametrize("text", ["NaN", "+Inf", "-Inf"])
def test_a_sample_that_is_no_finite_number_counts_as_none(text: str) -> None:
    """Prometheus knows NaN and infinity; a load of neither is reported."""
    samples = f"vllm:num_requests_running {text}\nvllm:kv_cache_usage_perc 0.5\n"
    load = parse_load(samples)
    assert (load.running, load.kv_usage) == (0, 0.5)
