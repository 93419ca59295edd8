import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from services.cli.main import main
from shared.models.event import Event, EventLevel
from shared.models.host import Host, Member, MemberKind
from shared.models.replica import Replica, ReplicaState
from shared.registry import Registry, open_registry
from shared.registry.replicas import ReplicaBeat
from shared.registry.results import Fence
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.servers import RedisServer

Do = Callable[..., tuple[int, str, str]]


@pytest.fixture
def do(
    redis_server: RedisServer,
    key_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Do:
    """Give a function that runs one command on a registry of its own: exit code, out, err."""
    monkeypatch.setenv("REDMESH_REDIS_URL", redis_server.url)
    monkeypatch.setenv("REDMESH_KEY_PREFIX", key_prefix)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def fill(redis_server: RedisServer, key_prefix: str) -> Callable[..., None]:
    """Give a function that does something with the registry that the commands see."""

    def run(act: Callable[[Registry], Awaitable[object]]) -> None:
        async def opened() -> None:
            settings = CommonSettings(redis_url=Secret(redis_server.url), key_prefix=key_prefix)
            registry = await open_registry(settings)
            try:
                await act(registry)
            finally:
                await registry.aclose()

        asyncio.run(opened())

    return run


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Write a models file with one simulated model of 2 replicas, at most 4."""
    path = tmp_path / "models.json"
    path.write_text(
        json.dumps(
            {
                "models": [
                    {
                        "name": "tiny",
                        "aliases": ["owner/tiny"],
                        "engine": {"kind": "sim", "model": "owner/tiny"},
                        "replicas": {"count": 2, "max": 4},
                    }
                ]
            }
        )
    )
    return path


async def _fleet(registry: Registry) -> None:
    """Register a host, its agent, and one READY replica."""
    await registry.fleet.put_host(
        Host(host="h1", address="127.0.0.1", cpus=2, memory_bytes=4 << 30)
    )
    await registry.fleet.beat(
        Member(kind=MemberKind.AGENT, id="h1", host="h1", pid=1, version="0", started_ms=0)
    )
    fence = Fence(1, "c1")
    await registry.replicas.create(
        fence,
        Replica(
            rid="tiny-000001",
            model="tiny",
            gen=7,
            state=ReplicaState.PENDING,
            host="h1",
            revision="r",
        ),
    )
    steps = (ReplicaState.PENDING, ReplicaState.STARTING, ReplicaState.READY)
    for before, after in itertools.pairwise(steps):
        await registry.replicas.transition(
            "tiny-000001",
            "tiny",
            gen=7,
            expect=before,
            to=after,
            fence=None,
            patch={"url": "http://127.0.0.1:1", "pid": 42},
        )
    await registry.fleet.emit(
        Event(
            kind="ReplicaFailed",
            subject="replica/tiny-000001",
            message="exit code 3",
            level=EventLevel.ERROR,
        )
    )


def _json(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(text)
    return found


def test_apply_declares_and_says_what_it_did(do: Do, models: Path) -> None:
    """A first apply creates, a second one changes nothing, a dry run of a change says so."""
    assert do("apply", "-f", str(models), "--dry-run")[1].strip().endswith("(dry run)")
    assert do("get", "deployments", "-o", "json")[1].strip() == "[]"
    assert do("apply", "-f", str(models))[1] == "deployment/tiny created, 2 replicas\n"
    assert do("apply", "-f", str(models))[1] == "deployment/tiny unchanged\n"
    models.write_text(models.read_text().replace('"count": 2', '"count": 3'))
    assert do("apply", "-f", str(models))[1] == "deployment/tiny updated\n"
    (record,) = _json(do("get", "deployments", "-o", "json")[1])
    assert (record["model"], record["replicas"], record["generation"]) == ("tiny", 3, 2)


def test_a_name_belongs_to_one_deployment(do: Do, models: Path, tmp_path: Path) -> None:
    """A file whose alias is another deployment's name is refused, and nothing is applied."""
    do("apply", "-f", str(models))
    other = tmp_path / "other.json"
    text = models.read_text().replace('"name": "tiny"', '"name": "other"')
    other.write_text(text)
    code, _, err = do("apply", "-f", str(other))
    assert code == 2
    assert "'owner/tiny' already belongs to the deployment 'tiny'" in err
    assert len(_json(do("get", "deployments", "-o", "json")[1])) == 1


def test_scale_stays_within_the_bounds_and_survives_an_apply(do: Do, models: Path) -> None:
    """A scaled number stays when the same file is applied again; outside the bounds is refused."""
    do("apply", "-f", str(models))
    assert do("scale", "owner/tiny", "4")[:2] == (0, "deployment/tiny scaled to 4\n")
    models.write_text(models.read_text().replace('"max": 4', '"max": 5'))
    do("apply", "-f", str(models))
    (record,) = _json(do("get", "deployments", "-o", "json")[1])
    assert record["replicas"] == 4
    code, _, err = do("scale", "tiny", "9")
    assert (code, "0 to 5 replicas, not 9" in err) == (2, True)
    assert do("scale", "nope", "1")[0] == 1


def test_a_deleted_deployment_can_be_declared_again(do: Do, models: Path) -> None:
    """Delete marks the deployment and wants no replicas; apply brings it back."""
    do("apply", "-f", str(models))
    assert do("delete", "tiny")[0] == 0
    (record,) = _json(do("get", "deployments", "-o", "json")[1])
    assert (record["deleted"], record["replicas"]) == (True, 0)
    assert do("scale", "tiny", "1")[0] == 1
    assert do("apply", "-f", str(models))[1] == "deployment/tiny created, 2 replicas\n"


def test_a_deployment_of_a_newer_release_is_named_with_the_remedy(
    do: Do, models: Path, key_prefix: str
) -> None:
    """What is stored and cannot be read is not overwritten; how to remove it is said, and works."""
    key, stored = f"{key_prefix}:{{ctl}}:deployments", '{"generation": 5, "spec": {"future": 1}}'
    assert do("redis", "--", "HSET", key, "tiny", stored)[0] == 0
    for arguments in (("apply", "-f", str(models)), ("scale", "tiny", "1")):
        code, _, err = do(*arguments)
        assert code == 1
        assert f"HDEL '{key}' tiny" in err
    assert do("redis", "--", "HDEL", key, "tiny")[0] == 0
    assert do("apply", "-f", str(models))[0] == 0


def test_get_lists_every_kind(do: Do, models: Path, fill: Callable[..., None]) -> None:
    """Each kind is listed as a table and as JSON, in singular and plural."""
    do("apply", "-f", str(models))
    fill(_fleet)
    for kind, part in {
        "deployment": "1/2",
        "replicas": "tiny-000001",
        "hosts": "alive",
        "proxy": "no proxy has registered",
        "controllers": "no controller has registered",
        "reservations": "nothing is in flight",
        "events": "exit code 3 [error]",
    }.items():
        code, out, _ = do("get", kind)
        assert (code, part in out) == (0, True), out
        assert isinstance(_json(do("get", kind, "-o", "json")[1]), list)
    (replica,) = _json(do("get", "replicas", "-m", "owner/tiny", "-o", "json")[1])
    assert (replica["pid"], replica["state"], replica["requests"]) == (42, "READY", 0)
    assert do("get", "things")[0] == 2
    assert do("get", "replicas", "-m", "nope")[0] == 1


def test_describe_shows_a_record_with_its_events(
    do: Do, models: Path, fill: Callable[..., None]
) -> None:
    """A description has the record, and the events of a deployment include its replicas'."""
    do("apply", "-f", str(models))
    fill(_fleet)
    out = do("describe", "deployment/tiny")[1]
    assert "tiny-000001: READY on h1" in out
    assert "exit code 3" in out
    assert "pid: 42" in do("describe", "replica", "tiny-000001")[1]
    assert "tiny-000001: READY" in do("describe", "host/h1")[1]
    code, _, err = do("describe", "host/h2")
    assert (code, err) == (1, "redmesh: there is no host 'h2'; there are: h1\n")
    assert do("describe", "nothing")[0] == 2


def test_holds_are_written_and_taken_back(do: Do, fill: Callable[..., None]) -> None:
    """Cordon and drain leave a hold that `get hosts` shows and `uncordon` removes."""
    fill(_fleet)
    assert do("cordon", "h1")[1] == "host/h1 cordoned\n"
    assert _json(do("get", "hosts", "-o", "json")[1])[0]["hold"] == "cordoned"
    assert do("drain", "host/h1")[1] == "host/h1 is draining\n"
    assert _json(do("get", "hosts", "-o", "json")[1])[0]["hold"] == "draining"
    assert do("uncordon", "h1")[0] == 0
    assert do("uncordon", "h1")[0] == 1
    assert do("cordon", "h2")[0] == 1
    assert do("drain", "h2")[0] == 1


def test_an_audit_of_an_idle_fleet_is_clean(
    do: Do, models: Path, fill: Callable[..., None]
) -> None:
    """A fleet without requests has no drift; a total that nothing explains is drift, exit 1."""
    do("apply", "-f", str(models))
    fill(_fleet)
    assert do("audit")[0] == 0

    async def spoil(registry: Registry) -> None:
        key = registry.keys.model("tiny").nreq
        await registry.connection.command("HSET", key, "tiny-000001", 3)

    fill(spoil)
    code, out, _ = do("audit", "-o", "json")
    findings = json.loads(out)["findings"]
    assert code == 1
    assert [(each["kind"], each["subject"], each["delta"]) for each in findings] == [
        ("requests", "tiny-000001", 3)
    ]


def test_an_audit_names_the_engines_that_it_did_not_hear(
    do: Do, models: Path, fill: Callable[..., None]
) -> None:
    """An engine of which nobody reports is not said to agree; once it is heard, it is."""
    do("apply", "-f", str(models))
    fill(_fleet)
    code, out, _ = do("audit")
    assert code == 0
    assert "ledger, proxies and engines agree" not in " ".join(out.split())
    assert "tiny-000001" in out
    assert json.loads(do("audit", "-o", "json")[1])["unheard"] == ["tiny-000001"]

    async def report(registry: Registry) -> None:
        await registry.replicas.heartbeat("tiny", [ReplicaBeat(rid="tiny-000001", gen=7)])

    fill(report)
    code, out, _ = do("audit")
    assert code == 0
    assert "clean: ledger, proxies and engines agree" in " ".join(out.split())
    assert json.loads(do("audit", "-o", "json")[1])["unheard"] == []


def test_redis_runs_one_command(do: Do, key_prefix: str) -> None:
    """Replies are written as redis-cli writes them."""
    assert do("redis", "--", "HSET", f"{key_prefix}:x", "a", '1 "2"')[1] == "(integer) 1\n"
    assert do("redis", "HGETALL", f"{key_prefix}:x")[1] == '1) "a"\n2) "1 \\"2\\""\n'
    assert do("redis", "GET", f"{key_prefix}:none")[1] == "(nil)\n"
    assert do("redis", "NOSUCHCOMMAND")[0] == 1
    do("redis", "DEL", f"{key_prefix}:x")


def test_doctor_names_what_is_missing_and_the_remedy(
    do: Do, models: Path, fill: Callable[..., None]
) -> None:
    """Without controller and proxies the doctor fails, and says what to start."""
    do("apply", "-f", str(models))
    fill(_fleet)
    code, out, _ = do("doctor", "-o", "json")
    verdicts = {check["name"]: check for check in json.loads(out)}
    assert code == 1
    assert verdicts["leader"]["verdict"] == verdicts["proxies"]["verdict"] == "fail"
    assert "redmesh proxy" in verdicts["proxies"]["remedy"]
    assert verdicts["redis"]["verdict"] == verdicts["agents"]["verdict"] == "ok"
    assert verdicts["model tiny"]["verdict"] == "warn"
