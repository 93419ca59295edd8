import os
import shlex
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from services.cli import farewell, meshplan, redisserver
from services.cli.logs import find, last_lines
from services.cli.meshplan import Wish
from services.cli.processes import ProcessRef, reference
from services.cli.statedir import Mesh, StateDir
from shared.errors import InvalidInputError, NotFoundError, RedmeshError
from shared.models.deployment import DeploymentSpec, EngineKind, EngineSpec

WISH = Wish(port=8000, proxies=2, controllers=2, hosts=2)


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    """Give a prepared state directory."""
    made = StateDir(tmp_path / "state")
    made.prepare()
    return made


def _mesh(**more: object) -> Mesh:
    fields: dict[str, object] = {
        "id": "m",
        "version": "0",
        "detached": True,
        "created_ms": 0,
        "children": (),
        "proxy_urls": ("http://127.0.0.1:8000", "http://127.0.0.1:8001"),
        "hosts": ("local-1",),
        "redis_port": 7000,
    }
    return Mesh(**(fields | more))  # pyright: ignore[reportArgumentType] - fields by name


def _spec(**engine: object) -> DeploymentSpec:
    return DeploymentSpec(name="m", engine=EngineSpec(model="o/n", **engine))  # pyright: ignore[reportArgumentType] - fields by name


def test_no_secret_is_on_a_command_line_or_in_the_plan(state: StateDir) -> None:
    """Children get files that hold the secrets; the plan names the files only."""
    state.ensure_fleet_secret()
    redis = redisserver.prepare(state)
    secrets = [state.fleet_secret_file.read_text(), state.redis_password_file.read_text()]
    plan = repr((redis.child, meshplan.children(state, WISH, "id", own_redis=True)))
    assert "REDMESH_FLEET_SECRET_FILE" in plan
    assert not any(secret.strip() in plan for secret in secrets)


def test_proxies_get_the_workers_that_were_asked_for(state: StateDir) -> None:
    """`up --workers 3` makes every proxy one of three workers."""
    wish = Wish(port=8000, proxies=2, controllers=1, hosts=1, workers=3)
    plan = meshplan.children(state, wish, "id", own_redis=True)
    proxies = [child.argv for child in plan if child.name.startswith("proxy-")]
    assert [argv[argv.index("--workers") + 1] for argv in proxies] == ["3", "3"]


def test_secret_files_are_readable_by_their_owner_only(state: StateDir) -> None:
    """Every file that holds a secret has mode 0600."""
    state.ensure_fleet_secret()
    redisserver.prepare(state)
    for path in (
        state.fleet_secret_file,
        state.redis_url_file,
        state.redis_password_file,
        state.redis / "redis.conf",
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700


def test_the_stop_goes_from_proxies_to_agents(state: StateDir) -> None:
    """Proxies stop first, then controllers, then agents, at last Redis."""
    plan = meshplan.children(state, WISH, "id", own_redis=True)
    stages = {child.name.split("-")[0]: child.stage for child in plan}
    stages["redis"] = redisserver.prepare(state).child.stage
    assert sorted(stages, key=lambda name: stages[name]) == [
        "proxy",
        "controller",
        "agent",
        "redis",
    ]


def test_agents_get_ports_of_their_own(state: StateDir) -> None:
    """Two agents of a mesh never share engine ports, and blocks in use are passed over."""
    taken: set[int] = set()
    first = meshplan.engine_ports(state, "local-1", taken)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", int(first.split("-")[0])))
        busy.listen()
        assert meshplan.engine_ports(state, "local-1", set()) != first
    assert meshplan.engine_ports(state, "local-1", taken) != first


def test_a_taken_port_is_named_with_the_remedy() -> None:
    """A port that something listens on is refused before anything is started."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(InvalidInputError, match=rf"port {port} is taken.*--port"):
            meshplan.check_ports(Wish(port=port, proxies=1, controllers=1, hosts=1))
    with pytest.raises(InvalidInputError, match="65535"):
        meshplan.check_ports(Wish(port=65_535, proxies=2, controllers=1, hosts=1))


def test_auto_takes_vllm_only_where_it_can_run(tmp_path: Path) -> None:
    """Without an engine environment auto means sim, and vllm is refused with the remedy."""
    environ = {"REDMESH_ENGINE_PYTHON": str(tmp_path / "python")}
    assert meshplan.choose_engine("auto", environ) is EngineKind.SIM
    with pytest.raises(InvalidInputError, match="make engine"):
        meshplan.choose_engine("vllm", environ)


def test_sim_replaces_every_engine_but_external_ones() -> None:
    """Simulated engines stand in for vLLM; a server that runs already stays what it is."""
    specs = [_spec(), _spec(kind=EngineKind.EXTERNAL, urls=("http://x",))]
    kinds = [spec.engine.kind for spec in meshplan.with_engine(specs, EngineKind.SIM)]
    assert kinds == [EngineKind.SIM, EngineKind.EXTERNAL]
    assert meshplan.with_engine(specs, EngineKind.VLLM) == specs


def test_a_state_directory_in_use_is_refused(state: StateDir) -> None:
    """While its supervisor or any child lives, no second mesh starts from the directory."""
    myself = reference(os.getpid())
    gone = ProcessRef(myself.pid if myself else 0, 1.0)
    state.write_mesh(_mesh(supervisor=myself))
    with pytest.raises(InvalidInputError, match="redmesh down --state-dir"):
        state.check_unused()
    state.write_mesh(_mesh(supervisor=gone, running={"redis": myself}))
    with pytest.raises(InvalidInputError, match="still run: redis"):
        state.check_unused()
    state.write_mesh(_mesh(supervisor=gone, running={"redis": gone}))
    state.check_unused()


def test_two_starts_at_once_are_kept_apart(state: StateDir) -> None:
    """The second `up` in one directory is refused while the first prepares it."""
    with (
        state.locked(),
        pytest.raises(InvalidInputError, match="another redmesh up"),
        state.locked(),
    ):
        pytest.fail("both hold the lock")


def test_a_broken_mesh_file_is_said_clearly(state: StateDir) -> None:
    """A mesh file that does not parse is an error with a remedy, not a crash."""
    state.mesh_file.write_text("{")
    with pytest.raises(RedmeshError, match="delete the file"):
        state.read_mesh()


def test_logs_are_found_by_service_and_replica(state: StateDir) -> None:
    """A log is found by the name of its service or replica; else the known ones are listed."""
    engine = state.agent("local-1") / "engines" / "m-1" / "engine.log"
    engine.parent.mkdir(parents=True)
    engine.write_text("".join(f"line {number}\n" for number in range(50_000)))
    state.log("proxy-0").write_text("x\n")
    assert find(state, "m-1") == find(state, "replica/m-1") == engine
    assert find(state, "proxy-0") == state.log("proxy-0")
    assert last_lines(engine, 2) == "line 49998\nline 49999"
    assert last_lines(state.log("none"), 2) == ""
    for name in ("m-2", "../../etc/passwd"):
        with pytest.raises(NotFoundError, match=r"there are: proxy-0, m-1"):
            find(state, name)


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_the_last_block_is_valid_shell(state: StateDir, shell: str) -> None:
    """What `up` prints at the end can be pasted: a shell reads all of it without complaint."""
    text = farewell.block(state, _mesh(), [_spec(), _spec(runner="pooling")])
    commands = text.split("\n", 3)[3]
    done = subprocess.run(
        [shell, "-n"], input=commands, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_last_block_names_every_proxy_and_quotes_braces(state: StateDir) -> None:
    """Each proxy is called as JSON and as text; the password is not in it; braces are quoted."""
    state.write_secret(state.redis_password_file, "hunter2")
    text = farewell.block(state, _mesh(), [_spec()])
    for port in (8000, 8001):
        assert f"http://127.0.0.1:{port}/v1/chat/m -H 'Content-Type: application/json'" in text
        assert f"'http://127.0.0.1:{port}/v1/chat/m?max_tokens=64'" in text
    assert "'redmesh:{m}:nreq'" in text
    assert "hunter2" not in text
    other = farewell.block(state, _mesh(), [_spec()], "other")
    assert all(key in other for key in ("'other:{m}:nreq'", "'other:{ctl}:events'"))
    assert "'redmesh:" not in other


def test_the_last_block_does_without_redis_cli(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no redis-cli, our own command stands in."""
    monkeypatch.setattr("shutil.which", lambda _name: None)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType] - stands in for any lookup
    text = farewell.block(state, _mesh(), [_spec()])
    (line,) = [line for line in text.splitlines() if ":nreq" in line]
    words = shlex.split(line)
    assert words[1:] == [
        "redis",
        "--state-dir",
        str(state.path),
        "--",
        "HGETALL",
        "redmesh:{m}:nreq",
    ]
