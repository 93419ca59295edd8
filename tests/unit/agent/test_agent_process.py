"""The agent as a process, with real sim engines and a real Redis: what it keeps when things die."""

import os
import signal
from collections.abc import Callable

import msgspec
import pytest

from services.agent import proctree
from services.agent.engine_http import request
from shared.admin import fetch
from shared.models.deployment import Deployment, EngineKind
from shared.models.host import MemberKind
from shared.models.order import OrderAction
from shared.models.replica import Replica, ReplicaState
from shared.registry.ledger import Release, Reserve
from shared.secret import Secret, replica_api_key
from tests.support.waiting import wait_until
from tests.unit.agent.fleet import MODEL, SIM, AgentProcess, Fleet, spec

S = ReplicaState
StartAgent = Callable[..., AgentProcess]
KEY = replica_api_key(Secret("secret-of-the-fleet"), "m-1", 1)


async def _generate(url: str, tokens: int) -> int:
    answer = await request(
        f"{url}/v1/completions",
        deadline_s=30,
        api_key=KEY,
        content={"model": MODEL, "prompt": "hi", "max_tokens": tokens, "ignore_eos": True},
    )
    return answer.status


async def _looks(admin_url: str) -> float:
    """Count the probes that the agent's engines have answered."""
    text = (await fetch(f"{admin_url}/metrics")).decode()
    name = "redmesh_agent_probe_seconds_count "
    return float(next(line for line in text.splitlines() if line.startswith(name))[len(name) :])


async def _beats_from_now_on(fleet: Fleet, rid: str) -> None:
    last = (await fleet.registry.replicas.heartbeats(MODEL)).get(rid, 0)

    async def newer() -> bool:
        return (await fleet.registry.replicas.heartbeats(MODEL)).get(rid, 0) > last

    await wait_until(newer, timeout_s=20)


@pytest.mark.timed
async def test_dead_engine_is_out_of_ready_within_a_second(
    fleet: Fleet, start_agent: StartAgent
) -> None:
    """An order starts an engine that becomes READY; its SIGKILL is FAILED in Redis within 1 s."""
    agent = start_agent()
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    record = await fleet.known("m-1")
    assert record.pid == agent.engine_files()["m-1"].pid
    assert record.max_model_len_tokens > 0
    assert await _generate(record.url, 1) == 200
    os.kill(record.pid, signal.SIGKILL)
    await fleet.becomes("m-1", S.FAILED, within_s=1.0)
    assert "SIGKILL" in (await fleet.known("m-1")).reason
    await wait_until(lambda: not agent.engine_files(), what="state file dropped")
    assert await fleet.kinds("m-1") == ["ReplicaReady", "ReplicaFailed"]
    assert (agent.state_dir / "engines/m-1/engine.log").exists()


async def test_killed_agent_adopts_its_engines(fleet: Fleet, start_agent: StartAgent) -> None:
    """After kill -9 and a restart of the agent the same engine serves and no state has changed."""
    agent = start_agent()
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    before = await fleet.known("m-1")
    agent.signal(signal.SIGKILL)
    assert await _generate(before.url, 3) == 200
    agent.start()

    await _beats_from_now_on(fleet, "m-1")
    assert b"engine_adopted" in agent.log.read_bytes()
    assert await fleet.known("m-1") == before
    os.kill(before.pid, signal.SIGKILL)
    await fleet.becomes("m-1", S.FAILED, within_s=1.0)


async def test_sigterm_leaves_engines_running(fleet: Fleet, start_agent: StartAgent) -> None:
    """An agent that is asked to end exits with 0 and its engines go on."""
    agent = start_agent()
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    record = await fleet.known("m-1")
    assert agent.signal(signal.SIGTERM) == 0
    assert await _generate(record.url, 1) == 200
    assert await fleet.state("m-1") is S.READY


async def test_stop_engines_on_exit(fleet: Fleet, start_agent: StartAgent) -> None:
    """With stop_engines_on_exit SIGTERM also ends the engines, and their records say STOPPED."""
    agent = start_agent(stop_engines_on_exit="true")
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    record = await fleet.known("m-1")
    assert agent.signal(signal.SIGTERM) == 0
    assert proctree.look_at(record.pid) is None
    assert await fleet.state("m-1") is S.STOPPED
    assert f"{MemberKind.AGENT}:h1" not in await fleet.registry.fleet.members()


async def test_engine_that_died_unwatched_is_reported(
    fleet: Fleet, start_agent: StartAgent
) -> None:
    """An engine that ended while no agent watched is FAILED as soon as an agent is back."""
    agent = start_agent()
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    agent.signal(signal.SIGKILL)
    os.kill((await fleet.known("m-1")).pid, signal.SIGKILL)
    agent.start()
    await fleet.becomes("m-1", S.FAILED)
    assert "while the agent was away" in (await fleet.known("m-1")).reason


async def test_drain_waits_for_the_ledger(fleet: Fleet, start_agent: StartAgent) -> None:
    """A draining replica stays until its last reservation is released, then is STOPPED."""
    start_agent(probe_interval_s="0.1")
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    pid = (await fleet.known("m-1")).pid
    ledger = fleet.registry.ledger
    reply = await ledger.batch(MODEL, "px", [Reserve("q1", 10, 0)])
    assert reply.results == ["m-1"]
    await fleet.order("m-1", spec(), OrderAction.DRAIN)
    await fleet.becomes("m-1", S.DRAINING)
    admin = (await fleet.registry.fleet.members())["agent:h1"].member.admin_url
    looks = await _looks(admin)

    async def looked_often() -> bool:
        return await _looks(admin) > looks + 3

    # The engine is idle, and seen to be: only the ledger holds it now.
    await wait_until(looked_often)
    assert await fleet.state("m-1") is S.DRAINING
    await ledger.batch(MODEL, "px", [Release("q1")])
    await fleet.becomes("m-1", S.STOPPED)
    assert proctree.look_at(pid) is None


async def test_drain_deadline_ends_the_wait(fleet: Fleet, start_agent: StartAgent) -> None:
    """A reservation that is never released holds a draining replica until its deadline only."""
    start_agent()
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    await fleet.registry.ledger.batch(MODEL, "px", [Reserve("q1", 10, 0)])
    await fleet.order("m-1", spec(), OrderAction.DRAIN, drain_timeout_s=1.0)
    await fleet.becomes("m-1", S.STOPPED)
    assert "deadline" in (await fleet.known("m-1")).reason


async def test_frozen_engine_is_unhealthy_until_it_thaws(
    fleet: Fleet, start_agent: StartAgent
) -> None:
    """A stopped process misses its probes and leaves READY; once it runs again it is READY."""
    start_agent(probe_interval_s="0.2", probe_deadline_s="0.3")
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    pid = (await fleet.known("m-1")).pid
    os.kill(pid, signal.SIGSTOP)
    await fleet.becomes("m-1", S.UNHEALTHY)
    assert "probes missed" in (await fleet.known("m-1")).reason
    os.kill(pid, signal.SIGCONT)
    await fleet.becomes("m-1", S.READY)


async def test_crash_while_redis_is_away_is_mended_alone(
    fleet: Fleet, start_agent: StartAgent
) -> None:
    """Without Redis a crashed engine is started again as the same replica on the same port."""
    agent = start_agent()
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    before = await fleet.known("m-1")
    record = msgspec.json.encode(before)
    fleet.redis.kill()
    os.kill(before.pid, signal.SIGKILL)

    async def answers() -> bool:
        try:
            return await _generate(before.url, 1) == 200
        except OSError:
            return False

    await wait_until(answers, timeout_s=30)
    after = agent.engine_files()["m-1"]
    assert after.pid != before.pid
    assert (after.order.gen, after.url) == (before.gen, before.url)
    fleet.redis.start()
    await fleet.lead()
    key = "redmesh:{m}:replicas"
    fleet.redis.command("HSET", key, "m-1", record.decode())
    await fleet.order("m-1", spec())

    async def corrected() -> bool:
        found = await fleet.known("m-1")
        return found.state is S.READY and found.pid == after.pid

    await wait_until(corrected, timeout_s=20)


async def test_emptied_redis_is_rebuilt_from_what_runs(
    fleet: Fleet, start_agent: StartAgent
) -> None:
    """After a loss of all data the host, the record and the beats come back; nothing restarts."""
    start_agent()
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    before = await fleet.known("m-1")
    fleet.redis.command("FLUSHALL")
    await fleet.becomes("m-1", S.READY)
    after = await fleet.known("m-1")
    assert (after.pid, after.url, after.gen) == (before.pid, before.url, before.gen)
    assert after.max_requests == 8

    async def host_is_back() -> bool:
        return "h1" in await fleet.registry.fleet.hosts()

    await wait_until(host_is_back, timeout_s=15)


async def test_order_gone_does_not_stop(fleet: Fleet, start_agent: StartAgent) -> None:
    """An engine whose order disappeared goes on, while its model is declared."""
    agent = start_agent()
    declared = Deployment(spec=spec(), generation=1, replicas=1)
    await fleet.registry.fleet.declare(MODEL, declared, 0)
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    before = await fleet.known("m-1")
    fleet.redis.command("DEL", "redmesh:{ctl}:orders:h1", "redmesh:{m}:replicas")
    await fleet.becomes("m-1", S.READY)
    assert (await fleet.known("m-1")).pid == before.pid
    assert "m-1" in agent.engine_files()


async def test_deleted_model_ends_after_grace(fleet: Fleet, start_agent: StartAgent) -> None:
    """An engine that nothing orders, records or declares ends, once its grace is over."""
    agent = start_agent(orphan_grace_s="0.5")
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    pid = (await fleet.known("m-1")).pid
    other = msgspec.structs.replace(spec(), name="other")
    await fleet.registry.fleet.declare("other", Deployment(spec=other, generation=1, replicas=1), 0)
    fleet.redis.command("DEL", "redmesh:{ctl}:orders:h1", "redmesh:{m}:replicas")
    await wait_until(lambda: proctree.look_at(pid) is None, timeout_s=20)
    await wait_until(lambda: not agent.engine_files())


async def test_zombie_of_an_old_incarnation_is_ended(fleet: Fleet, start_agent: StartAgent) -> None:
    """An engine whose record is of a later incarnation is ended, and the later one is started."""
    agent = start_agent()
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    old = await fleet.known("m-1")
    new = Replica(
        rid="m-1", model=MODEL, gen=2, state=S.PENDING, host="h1", revision="r1", kind=old.kind
    )
    fleet.redis.command("HSET", "redmesh:{m}:replicas", "m-1", msgspec.json.encode(new).decode())
    await fleet.order("m-1", spec(), gen=2)
    await fleet.becomes("m-1", S.READY)
    assert proctree.look_at(old.pid) is None
    assert agent.engine_files()["m-1"].order.gen == 2


async def test_missing_model_fails_at_once(fleet: Fleet, start_agent: StartAgent) -> None:
    """A vLLM order whose model path does not exist is FAILED at once, with the path."""
    start_agent(engine_python="/bin/true")
    engine = msgspec.structs.replace(SIM, kind=EngineKind.VLLM, model="/no/such/model")
    await fleet.create("m-1", spec(engine))
    await fleet.becomes("m-1", S.FAILED, within_s=5)
    assert "/no/such/model" in (await fleet.known("m-1")).reason


async def test_missing_engine_environment_fails_at_once(
    fleet: Fleet, start_agent: StartAgent
) -> None:
    """A vLLM order on a host without vLLM is FAILED at once, with the remedy."""
    agent = start_agent(engine_python="/no/such/python")
    engine = msgspec.structs.replace(SIM, kind=EngineKind.VLLM, model=str(agent.state_dir))
    await fleet.create("m-1", spec(engine))
    await fleet.becomes("m-1", S.FAILED, within_s=5)
    assert "REDMESH_ENGINE_PYTHON" in (await fleet.known("m-1")).reason
    assert (await fleet.registry.fleet.hosts())["h1"].engines == ("sim", "external")


async def test_engine_that_cannot_start_says_why(fleet: Fleet, start_agent: StartAgent) -> None:
    """An engine that exits while it starts is FAILED with its exit code and its last words."""
    start_agent()
    engine = msgspec.structs.replace(SIM, args=("--no-such-flag",))
    await fleet.create("m-1", spec(engine))
    await fleet.becomes("m-1", S.FAILED)
    reason = (await fleet.known("m-1")).reason
    assert "code 2" in reason
    assert "--no-such-flag" in reason


async def test_engine_that_never_answers_times_out(fleet: Fleet, start_agent: StartAgent) -> None:
    """An engine that is not ready within its startup timeout is FAILED and ended."""
    agent = start_agent()
    engine = msgspec.structs.replace(SIM, args=("--never-ready",), startup_timeout_s=1)
    await fleet.create("m-1", spec(engine))
    await fleet.becomes("m-1", S.STARTING)
    pid = agent.engine_files()["m-1"].pid
    await fleet.becomes("m-1", S.FAILED)
    assert "startup_timeout_s" in (await fleet.known("m-1")).reason
    await wait_until(lambda: proctree.look_at(pid) is None)


async def test_external_server_is_probed_and_never_stopped(
    fleet: Fleet, start_agent: StartAgent
) -> None:
    """An external server is READY once it answers, stays so over a restart, outlives its order."""
    agent = start_agent()
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    server = await fleet.known("m-1")
    external = msgspec.structs.replace(SIM, kind=EngineKind.EXTERNAL, api_key_env="UPSTREAM_KEY")
    await fleet.create("x-1", spec(external), url=server.url)
    await fleet.becomes("x-1", S.FAILED)
    assert "UPSTREAM_KEY" in (await fleet.known("x-1")).reason
    agent.signal(signal.SIGTERM)
    agent.environment["UPSTREAM_KEY"] = KEY
    agent.start()
    await fleet.create("x-2", spec(external), url=f"{server.url}/v1")
    await fleet.becomes("x-2", S.READY)
    before = await fleet.known("x-2")
    assert before.url == server.url
    agent.signal(signal.SIGKILL)
    agent.start()
    await _beats_from_now_on(fleet, "x-2")
    assert await fleet.known("x-2") == before
    await fleet.order("x-2", spec(external), OrderAction.STOP)
    await fleet.becomes("x-2", S.STOPPED)
    assert await _generate(server.url, 1) == 200


async def test_secrets_stay_with_the_agent(fleet: Fleet, start_agent: StartAgent) -> None:
    """No engine sees the agent's settings; no key is in an argument or in the state file."""
    agent = start_agent()
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    pid = (await fleet.known("m-1")).pid
    assert proctree.carries(pid, KEY)
    assert not proctree.carries(pid, "REDMESH_")
    assert not proctree.carries(pid, "secret-of-the-fleet")
    process = proctree.look_at(pid)
    assert process is not None
    assert KEY not in process.command_line
    state = (agent.state_dir / "engines/m-1/engine.json").read_text()
    assert KEY not in state
    assert "secret-of-the-fleet" not in state


async def test_second_agent_on_one_state_dir_is_refused(
    fleet: Fleet, start_agent: StartAgent
) -> None:
    """Two agents cannot share a state directory: the second says so and exits with 1."""
    first = start_agent()
    await wait_until(lambda: b"agent_started" in first.log.read_bytes())
    second = start_agent()
    assert second.wait() == 1
    assert b"another agent" in second.log.read_bytes()


async def test_second_agent_of_one_host_name_is_refused(
    fleet: Fleet, start_agent: StartAgent
) -> None:
    """An agent does not become a host that another one is: that one's replicas stay READY."""
    start_agent()
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    before = await fleet.known("m-1")
    second = start_agent("namesake")
    assert second.wait() == 1
    assert b"REDMESH_HOST_NAME" in second.log.read_bytes()
    assert await fleet.known("m-1") == before


async def test_admin_port_tells_what_runs(fleet: Fleet, start_agent: StartAgent) -> None:
    """The member record leads to health, metrics and the live table of engines."""
    start_agent()
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    member = (await fleet.registry.fleet.members())["agent:h1"].member
    assert b"ready" in await fetch(f"{member.admin_url}/health/ready")
    assert b'"phase":"ready"' in await fetch(f"{member.admin_url}/live/engines")
    metrics = await fetch(f"{member.admin_url}/metrics")
    assert b'redmesh_agent_engines{phase="ready"} 1.0' in metrics


async def test_agent_starts_without_redis_to_watch_its_engines(
    fleet: Fleet, start_agent: StartAgent
) -> None:
    """With engines to adopt, an agent starts while Redis is away, mends a crash, and connects."""
    agent = start_agent()
    await fleet.create("m-1", spec())
    await fleet.becomes("m-1", S.READY)
    before = await fleet.known("m-1")
    fleet.redis.kill()
    agent.signal(signal.SIGKILL)
    agent.start()
    await wait_until(lambda: b"watching over adopted engines" in agent.log.read_bytes())
    os.kill(before.pid, signal.SIGKILL)
    await wait_until(lambda: agent.engine_files()["m-1"].pid not in {0, before.pid})
    fleet.redis.start()
    await fleet.becomes("m-1", S.READY)
    assert (await fleet.known("m-1")).pid == agent.engine_files()["m-1"].pid


async def test_agent_without_redis_and_engines_says_so(
    fleet: Fleet, start_agent: StartAgent
) -> None:
    """Without Redis and without anything to watch, the agent exits with 1 and one clear line."""
    fleet.redis.kill()
    agent = start_agent()
    assert agent.wait() == 1
    lines = agent.log.read_text().splitlines()
    assert len(lines) == 1
    assert "REDMESH_REDIS_URL" in lines[0]


async def test_wrong_settings_are_refused_at_once(fleet: Fleet, start_agent: StartAgent) -> None:
    """Settings that cannot work end the agent with 2, all problems listed."""
    agent = start_agent(port_range="9-8", gpus="many")
    assert agent.wait() == 2
    said = agent.log.read_text()
    assert "REDMESH_PORT_RANGE" in said
    assert "REDMESH_GPUS" in said
