"""`redmesh drill run` from its options to its exit code, on a mesh that is pretended."""

import contextlib
import json
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.cli.drill import production, rehearsal, remote
from services.cli.drill.catalogue import budget_of, find
from services.cli.drill.injection import Injection
from services.cli.drill.options import Target
from services.cli.drill.records import Struck
from services.cli.drill.scene import LEASE_S, lease_s, look
from services.cli.main import main
from services.cli.statedir import StateDir
from shared.models.drill import Production
from shared.models.host import Hold
from shared.registry import Registry, open_registry
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.redis_link import Link
from tests.support.servers import RedisServer, Servers
from tests.support.waiting import wait_until_sync
from tests.unit.cli.pretended import PretendedMesh

Captured = pytest.CaptureFixture[str]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def server(servers: Servers) -> Generator[RedisServer]:
    """Start a Redis of its own: drills disturb it."""
    made = servers.new()
    yield made
    made.kill()


@pytest.fixture
def settings(
    server: RedisServer, key_prefix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> CommonSettings:
    """Let commands find the pretended mesh, and drills be short."""
    monkeypatch.setenv("REDMESH_REDIS_URL", server.url)
    monkeypatch.setenv("REDMESH_KEY_PREFIX", key_prefix)
    monkeypatch.chdir(tmp_path)
    for name in ("BEFORE_S", "AFTER_S", "LIVE_BEFORE_S"):
        monkeypatch.setattr(rehearsal, name, 2.2 if name == "LIVE_BEFORE_S" else 0.3)
    monkeypatch.setattr(rehearsal, "NOTICED_S", 0.1)
    return CommonSettings(redis_url=Secret(server.url), key_prefix=key_prefix)


@pytest.fixture
def run(settings: CommonSettings, capsys: Captured, tmp_path: Path) -> Run:
    """Give a function that runs a drill: exit code, out, err."""

    def act(name: str, *options: str) -> tuple[int, str, str]:
        capsys.readouterr()
        load = ("--load", "users=3,tokens=9") if "--load" not in options else ()
        code = main(["drill", "run", name, "--out", str(tmp_path / "out"), *load, *options])
        out, err = capsys.readouterr()
        return code, out, err

    return act


def report(tmp_path: Path) -> dict[str, Any]:
    """Read the report that was written."""
    return json.loads((tmp_path / "out" / "report.json").read_bytes())


@pytest.mark.parametrize(
    "name", ["replica-kill", "replica-freeze", "redis-disconnect", "rolling-upgrade"]
)
def test_a_drill_passes_where_all_is_as_promised(
    run: Run, settings: CommonSettings, name: str, tmp_path: Path
) -> None:
    """Fault, recovery and verdict are told in the terminal and in the three files."""
    with PretendedMesh(settings):
        code, out, err = run(name)
    assert code == 0, f"{out}\n{err}"
    assert f"Drill {name}: PASSED" in out
    assert "FAULT: " in err
    found = report(tmp_path)
    assert found["seen"]["traffic"]["compared"]
    assert found["seen"]["traffic"]["ok"] == found["seen"]["traffic"]["count"] > 0
    assert {"fault", "recovered", "whole", "exact"} <= {mark["kind"] for mark in found["marks"]}
    assert (tmp_path / "out" / "report.html").exists()


def test_redis_that_answers_nobody_is_seen_away_and_back(
    run: Run, settings: CommonSettings, tmp_path: Path
) -> None:
    """CLIENT PAUSE is noticed by the watch, and recovery counts from the first answer."""
    with PretendedMesh(settings):
        code, out, err = run("redis-away", "--hold", "1.5", "-o", "json")
    assert code == 0, f"{out}\n{err}"
    seen = json.loads(out)["seen"]
    assert seen["fault_s"] < seen["answers_s"] <= seen["recovered_s"]


@contextlib.contextmanager
def managed(servers: Servers) -> Generator[tuple[Link, RedisServer, RedisServer]]:
    """Run a primary and a replica behind one address, which leads to whoever is primary."""
    primary, spare = servers.new(), servers.new()
    spare.command("REPLICAOF", "127.0.0.1", primary.port)
    wait_until_sync(lambda: spare.command("ROLE")[3:4] == [b"connected"], what="a copy is there")
    over = threading.Event()

    def follow() -> None:
        """Lead new connections to the new primary; those that are open stay, as with a name."""
        while not over.wait(0.05):
            if spare.command("ROLE")[0] == b"master":
                link.lead_to(spare.port, cut=False)
                return

    with Link(primary.port) as link:
        following = threading.Thread(target=follow)
        following.start()
        try:
            yield link, primary, spare
        finally:
            over.set()
            following.join(20)
            primary.kill()
            spare.kill()


def test_redis_fails_over_by_its_own_command(
    run: Run,
    servers: Servers,
    settings: CommonSettings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """FAILOVER makes the replica primary; everybody finds it by the same address."""
    with managed(servers) as (link, primary, spare):
        monkeypatch.setenv("REDMESH_REDIS_URL", link.url())
        behind = msgspec.structs.replace(settings, redis_url=Secret(link.url()))
        with PretendedMesh(behind):
            code, out, err = run("redis-failover", "--via", "redis")
        assert code == 0, f"{out}\n{err}"
        assert "FAILOVER to a replica of Redis" in err
        assert spare.command("ROLE")[0] == b"master"
        assert primary.command("ROLE")[0] == b"slave"
    assert report(tmp_path)["seen"]["sign"].startswith("after ")


def test_a_fault_that_nobody_saw_is_missed(
    run: Run, settings: CommonSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the fault did not strike, all is well, and nothing has been rehearsed: exit code 1."""

    async def nothing() -> None:
        """Do what an injector does that has no effect."""

    async def idle(*_: object) -> Injection:
        return Injection("nothing at all", Struck(), nothing, heal=nothing)

    monkeypatch.setattr(remote, "by_redis", idle)
    monkeypatch.setattr(rehearsal, "LONGER_S", 0.5)
    with PretendedMesh(settings):
        budget = "recover_s=1,whole_s=1,drift_s=2"
        code, out, _ = run("redis-away", "--hold", "1", "--budget", budget)
    assert code == 1, out
    missed = [c["name"] for c in report(tmp_path)["verdict"]["checks"] if not c["passed"]]
    assert missed == ["fault"]
    assert "the fault is seen: Redis answers nobody" in out


def test_a_broken_stream_misses_the_budget(run: Run, settings: CommonSettings) -> None:
    """Streams that end early after the fault are exit code 1, unless the budget allows them."""
    with PretendedMesh(settings, flaw="cut"):
        code, out, _ = run("replica-kill", "--budget", "recover_s=30")
        assert code == 1
        assert "no streams broken" in out
        assert "MISSED" in out


def test_what_an_agent_refuses_is_one_message(
    run: Run, settings: CommonSettings, tmp_path: Path
) -> None:
    """A refusal in the middle of the load ends the drill with exit code 2 and its reason."""
    with PretendedMesh(settings, flaw="refuse"):
        code, out, err = run("replica-kill")
    assert (code, out) == (2, "")
    assert "refused: not today" in err
    assert "Traceback" not in err


def test_live_traffic_is_watched_and_not_driven(
    run: Run, settings: CommonSettings, tmp_path: Path
) -> None:
    """With `live` no request is sent: what the proxies count is judged."""
    with PretendedMesh(settings):
        code, out, err = run("replica-kill", "--load", "live")
    assert code == 0, f"{out}\n{err}"
    traffic = report(tmp_path)["seen"]["traffic"]
    assert (traffic["driven"], traffic["compared"]) == (False, False)
    assert traffic["ok"] > 0


def test_streams_begin_at_a_rate(run: Run, settings: CommonSettings, tmp_path: Path) -> None:
    """With a rate, streams begin whatever becomes of the earlier ones."""
    with PretendedMesh(settings):
        code, out, err = run("redis-disconnect", "--load", "rate=20,tokens=5")
    assert code == 0, f"{out}\n{err}"
    assert report(tmp_path)["seen"]["traffic"]["count"] >= 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("proxy-drain",), "--ecs-cluster"),
        (("proxy-kill",), "--state-dir"),
        (("redis-restart",), "was not started here"),
        (("redis-empty",), "only the Redis of a mesh"),
        (("redis-failover",), "no replica that could become primary"),
        (("partition-proxy-redis",), "redmesh up --links"),
        (("host-loss",), "do not run on this machine"),
        (("replica-kill", "--via", "signal"), "do not run on this machine"),
        (("replica-kill", "--via", "redis"), "has no way"),
        (("replica-kill", "--target", "replica=r9"), "r1 on h1"),
        (("replica-kill", "--target", "model=x"), "there are: m"),
        (("proxy-drain", "--via", "ecs"), "--ecs-cluster"),
        (("proxy-drain", "--via", "ecs", "--ecs-cluster", "x", "--target", "proxy=q"), "p0 ("),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_struck(
    run: Run, settings: CommonSettings, arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    """Exit code 2, what is missing in one message, and no report."""
    with PretendedMesh(settings):
        code, out, err = run(*arguments)
    assert (code, out) == (2, ""), f"{out}\n{err}"
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_production_asks_for_yes(run: Run, settings: CommonSettings, capsys: Captured) -> None:
    """A marked fleet refuses; with --yes, or unmarked again, it does not."""
    with PretendedMesh(settings):
        assert main(["production"]) == 0
        assert "not marked" in capsys.readouterr().out
        assert main(["production", "on", "--note", "paying users"]) == 0
        code, _, err = run("redis-disconnect")
        assert code == 2
        assert "paying users" in err
        assert run("redis-disconnect", "--yes")[0] == 0
        assert main(["production", "off"]) == 0
        assert "not marked" in capsys.readouterr().out


@pytest.mark.parametrize("lease_ms", [3000, 5000, 12_340])
async def test_the_lease_is_as_long_as_it_is_seen_to_be(
    settings: CommonSettings, tmp_path: Path, lease_ms: int
) -> None:
    """Budgets of leadership follow from the lease that this fleet's controllers really have."""
    with PretendedMesh(settings, lease_ms=lease_ms):
        registry = await open_registry(settings)
        scene = await look(registry, StateDir(tmp_path / "none"), Target())
        await registry.aclose()
    facts = scene.facts()
    assert lease_ms / 1000 - 0.5 < facts.lease_s <= lease_ms / 1000 + 0.1
    budget = budget_of(find("controller-failover"), facts)
    assert budget.recover_s == pytest.approx(1.5 * facts.lease_s)


async def test_a_lease_that_nobody_renews_tells_nothing(registry: Registry) -> None:
    """Without a renewal in sight, the usual length is taken for granted."""
    await registry.leadership.try_lead("c1", 30_000)
    assert await lease_s(registry) == LEASE_S


async def test_what_only_redis_knew_is_given_back(registry: Registry) -> None:
    """Mark and holds that an emptied Redis lost are written again; later ones stay."""
    mark = Production(since_ms=1, by="op")
    hold = Hold(subject="host:h", drain=True, since_ms=1)
    await registry.drills.mark_production(mark)
    await registry.fleet.put_hold(hold)
    kept = await production.read_wishes(registry)
    await registry.connection.command("DEL", registry.keys.fleet.production)
    await registry.fleet.put_hold(msgspec.structs.replace(hold, since_ms=2))
    await production.give_back(registry, kept)
    assert await registry.drills.production() == mark
    assert (await registry.fleet.holds())["host:h"].since_ms == 2
    await registry.connection.command("DEL", registry.keys.fleet.holds)
    await production.give_back(registry, kept)
    assert dict(await registry.fleet.holds()) == {"host:h": hold}


def test_a_mesh_that_is_not_whole_is_no_place_for_a_drill(
    run: Run, settings: CommonSettings
) -> None:
    """What is missing is named: its faults could not be told from the drill's."""
    with PretendedMesh(settings, flaw="short"):
        code, _, err = run("replica-kill")
    assert code == 2
    assert "1 of 2 replicas are READY" in err
