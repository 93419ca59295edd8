"""docs/redis.md: each of its redis-cli examples works on the data that redmesh writes."""

import contextlib
import re
import shlex
from pathlib import Path

from shared.models.deployment import Deployment, DeploymentSpec
from shared.models.event import Event
from shared.models.host import Hold
from shared.models.replica import TRANSITIONS, ReplicaState
from shared.registry import open_registry
from shared.registry.keys import FLEET_KEYS, MODEL_KEYS, STREAM_KEYS
from shared.registry.routes import RoutesReset
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.lua.exercise import MODEL, STREAM, tour
from tests.support.servers import Servers

TEXT = (Path(__file__).parents[3] / "docs" / "redis.md").read_text()
EXAMPLE = re.compile(r"^\$ redis-cli (.+)$", re.MULTILINE)


async def test_examples_work(servers: Servers) -> None:
    """Every example runs without error, and every key has an example that reads its type."""
    server = servers.new()
    registry = await open_registry(CommonSettings(redis_url=Secret(server.url)))
    await tour(registry)
    await registry.fleet.put_hold(Hold(subject="host:h1", drain=False, since_ms=1))
    await registry.fleet.bury(
        Deployment(spec=DeploymentSpec(name="gone"), generation=2, replicas=0, deleted=True)
    )
    await registry.fleet.emit(Event(kind="Tested", subject="x", message="y"))
    await registry.aclose()
    read: set[str] = set()
    for line in EXAMPLE.findall(TEXT):
        words = shlex.split(line, comments=True)
        if words[0] in {"PSUBSCRIBE", "ACL"}:
            continue
        names = {"tinyllama": MODEL, "px-1": "p1", "host-1": "h1", "s:ID": f"s:{STREAM}"}
        for name, real in names.items():
            words = [word.replace(name, real) for word in words]
        reply = server.command(*words)
        suffix = words[1].split("}:")[1]
        assert reply or suffix == "suspect", f"{line} shows nothing"
        tag = "ctl:" if "{ctl}" in words[1] else "s:" if "{s:" in words[1] else "M:"
        read.add(tag + suffix)
    server.command("ACL", "SETUSER", "redmesh", "on", ">p", "~redmesh:*", "&redmesh:*", "+@all")
    server.kill()
    wanted = {f"M:{suffix.replace('<proxy>', 'p1')}" for suffix in MODEL_KEYS}
    wanted |= {f"ctl:{suffix.replace('<host>', 'h1')}" for suffix in FLEET_KEYS}
    wanted |= {f"s:{suffix}" for suffix in STREAM_KEYS}
    assert read == wanted


async def test_recommended_user_is_enough(servers: Servers) -> None:
    """The user that the document recommends can do everything that redmesh does."""
    server = servers.new()
    rule = next(line for line in EXAMPLE.findall(TEXT) if line.startswith("ACL SETUSER"))
    server.command(*shlex.split(rule))
    url = f"redis://redmesh:PASSWORD@127.0.0.1:{server.port}/0"
    registry = await open_registry(CommonSettings(redis_url=Secret(url)))
    await tour(registry)
    async with contextlib.aclosing(registry.routes.hints()) as hints:
        assert isinstance(await anext(hints), RoutesReset)
    await registry.aclose()
    server.kill()


def test_states_are_drawn_as_they_are() -> None:
    """The diagram of states names every state, and its arrows are those of the table."""
    diagram = TEXT.split("## States of a replica")[1].split("##")[0]
    assert all(str(state) in diagram for state in ReplicaState)
    arrows = {
        (ReplicaState.PENDING, ReplicaState.STARTING),
        (ReplicaState.STARTING, ReplicaState.READY),
        (ReplicaState.READY, ReplicaState.UNHEALTHY),
        (ReplicaState.UNHEALTHY, ReplicaState.READY),
        (ReplicaState.DRAINING, ReplicaState.STOPPED),
    }
    drains = {ReplicaState.STARTING, ReplicaState.READY, ReplicaState.UNHEALTHY}
    arrows |= {(state, ReplicaState.DRAINING) for state in drains}
    ended = {ReplicaState.STOPPED, ReplicaState.FAILED}
    arrows |= {(state, ReplicaState.FAILED) for state in set(ReplicaState) - ended}
    assert arrows == {(state, after) for state, nexts in TRANSITIONS.items() for after in nexts}
