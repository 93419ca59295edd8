"""What a person gets who is mistaken: the field or flag, the remedy, an exit code, nothing lost.

Exit code 2 means that the input must be mended, 1 that the world lacks something. There is never a
traceback, and a refused command leaves nothing behind.
"""

import asyncio
import json
from collections.abc import Generator, Mapping
from pathlib import Path

import pytest

from shared.registry.connection import connect
from shared.registry.results import text_of
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.mesh import (
    Done,
    free_ports,
    listening,
    redis_server,
    redmesh,
    sim_model,
    write_models,
)

SERVICES = ("proxy", "controller", "agent")


@pytest.fixture(scope="module")
def redis_url() -> Generator[str]:
    """Run an empty Redis that no mesh uses."""
    with redis_server() as url:
        yield url


def refused(done: Done, code: int, *words: str) -> None:
    """Assert that a command was refused with `code` in a message that holds `words`."""
    assert done.code == code, done
    assert done.clear, done
    missing = [word for word in words if word not in done.err]
    assert not missing, f"{missing} missing from\n{done}"
    assert len(done.err) < 4000, "a message that nobody reads"


def serve(service: str, tmp_path: Path, env: Mapping[str, str], *flags: str) -> Done:
    """Run a service that is expected to refuse to start."""
    settings = {"REDMESH_FLEET_SECRET": "s" * 32, "REDMESH_STATE_DIR": str(tmp_path), **env}
    return redmesh(service, *flags, env=settings, timeout_s=30)


BAD_MODELS = {
    "models": [
        {
            "name": "two words",
            "engine": {"kind": "vlm", "model": "x/y"},
            "replicas": {"count": -1},
        },
        {"name": "fine", "engine": {"model": "x/y", "quantization": "int3"}, "replica": 2},
    ]
}


@pytest.mark.parametrize("command", [("apply", "-f"), ("up", "--detach", "--models")])
def test_every_mistake_of_a_models_file_is_told_in_one_run(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Each problem has its file, its place, what was expected and what was given."""
    path = tmp_path / "models.json"
    path.write_text(json.dumps(BAD_MODELS))
    done = redmesh(*command, path, "--state-dir", tmp_path / "state")
    refused(done, 2, str(path), "nothing was applied")
    refused(done, 2, "models[0].name", "two words", "models[0].engine.kind", "vlm", "external")
    refused(done, 2, "models[0].replicas.count", "-1", "models[1].engine.quantization", "int3")
    refused(done, 2, "models[1]", "'replica'", "replicas")
    assert not (tmp_path / "state" / "mesh.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"models": [}', (":1:13", "not JSON")),
        ("", ("not JSON",)),
        ("[]", ("object",)),
        ('{"models": []}', ("models",)),
        ('{"models": [{"name": "a", "name": "b"}]}', ("'name'", "twice")),
        ("\x00\xff", ("not JSON",)),
    ],
)
def test_a_file_that_is_no_models_file_is_refused_in_place(
    tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    """What is not JSON, or not the JSON of a models file, is told with the place."""
    path = tmp_path / "models.json"
    path.write_bytes(text.encode("latin-1"))
    refused(redmesh("apply", "-f", path), 2, "models.json", *words)


def test_missing_files_are_named(tmp_path: Path) -> None:
    """A models file or a folder of weights that does not exist is named with its place."""
    refused(redmesh("apply", "-f", tmp_path / "none.json"), 2, "none.json", "No such file")
    models = write_models(tmp_path / "models.json", {"name": "a", "engine": {"model": "./nowhere"}})
    refused(redmesh("apply", "-f", models), 2, "models[0].engine.model", "nowhere")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("up", "--nonsense"), ("--nonsense",)),
        (("up", "--port", "99999"), ("--port", "99999")),
        (("up", "--port", "65535", "--proxies", "2", "--engine", "sim"), ("--port", "65536")),
        (("up", "--engine", "tpu"), ("--engine", "vllm", "sim")),
        (("up", "--proxies", "0"), ("--proxies",)),
        (("get", "nonsense"), ("nonsense", "replicas")),
        (("scale", "demo", "-1"), ("-1",)),
        (("scale", "demo", "many"), ("many",)),
        (("apply",), ("--file",)),
        (("nonsense",), ("nonsense",)),
        (("proxy", "--port", "many"), ("--port", "many")),
        (("proxy", "--nonsense"), ("--nonsense",)),
        (("agent", "--port-range", "9-1"), ("port_range".upper(), "18000-18999")),
        (("agent", "--gpus", "all"), ("GPUS", "auto")),
        (("controller", "--host-name", "two words"), ("HOST_NAME", "two words")),
        (("simengine", "--port", "many"), ("--port", "many")),
    ],
)
def test_wrong_flags_are_named(
    tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """A wrong flag or value is named, with what it may be, and nothing is started."""
    env = {"REDMESH_FLEET_SECRET": "s" * 32}
    refused(redmesh(*arguments, env=env), 2, *words)


def test_all_mistakes_in_settings_are_told_at_once(tmp_path: Path) -> None:
    """A service lists every wrong setting in one run, by the name it was given by."""
    env = {"REDMESH_PORT": "many", "REDMESH_MAX_TRIES": "x", "REDMESH_MAX_BODY_BYTES": "1e"}
    done = redmesh("proxy", env=env)
    refused(done, 2, "REDMESH_PORT", "REDMESH_MAX_TRIES", "REDMESH_MAX_BODY_BYTES")


@pytest.mark.parametrize("service", SERVICES)
def test_services_without_redis_say_so(tmp_path: Path, service: str) -> None:
    """A service that has never met its Redis does not start, and names the address it tried."""
    port = free_ports(1)
    url = f"redis://someone:hidden@127.0.0.1:{port}/0"
    done = serve(service, tmp_path, {"REDMESH_REDIS_URL": url}, *_own_ports(service))
    refused(done, 1, f"127.0.0.1:{port}", "REDMESH_REDIS_URL")
    assert "hidden" not in done.err + done.out


def _own_ports(service: str) -> tuple[str, ...]:
    return ("--port", "0") if service == "proxy" else ()


def test_commands_without_redis_say_so(tmp_path: Path) -> None:
    """An operator's command tells which Redis does not answer, or that no mesh runs here."""
    url = f"redis://127.0.0.1:{free_ports(1)}/0"
    for command in (("get", "replicas"), ("audit",), ("scale", "demo", "2")):
        refused(redmesh(*command, "--redis-url", url), 1, "--redis-url")
    state = tmp_path / "state"
    refused(redmesh("get", "replicas", "--state-dir", state), 1, str(state), "redmesh up")
    models = write_models(tmp_path / "models.json", sim_model("a"))
    up = ("up", "--detach", "--models", models, "--state-dir", state, "--port", str(free_ports(2)))
    refused(redmesh(*up, "--redis-url", url), 1, "--redis-url")
    assert not (state / "mesh.json").exists()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:6379", ("redis://",)),
        ("redis://127.0.0.1:port/0", ("redis://",)),
        ("nonsense", ("redis://",)),
    ],
)
def test_a_redis_url_that_is_none_is_refused(url: str, words: tuple[str, ...]) -> None:
    """What is not the URL of a Redis is refused as bad input, with an example."""
    refused(redmesh("get", "replicas", "--redis-url", url), 2, *words)


def test_a_taken_port_is_named(tmp_path: Path, redis_url: str) -> None:
    """`up` and each service name the port that is taken; a refused `up` leaves nothing."""
    models = write_models(tmp_path / "models.json", sim_model("a"))
    state = tmp_path / "state"
    with listening() as port:
        up = ("up", "--detach", "--models", models, "--state-dir", state, "--port", str(port))
        refused(redmesh(*up, "--proxies", "1"), 2, "--port", str(port), "taken")
        assert not (state / "mesh.json").exists()
        env = {"REDMESH_REDIS_URL": redis_url}
        refused(serve("proxy", tmp_path, env, "--port", str(port)), 1, str(port))
        for service in SERVICES:
            flags = ("--admin-port", str(port), *_own_ports(service))
            refused(serve(service, tmp_path, env, *flags), 1, str(port))
        refused(redmesh("simengine", "--model", "m", "--port", str(port)), 1, str(port))


def test_a_missing_engine_environment_is_told_with_the_remedy(tmp_path: Path) -> None:
    """`up --engine vllm` without an engine environment starts nothing and names `make engine`."""
    (tmp_path / "weights").mkdir()
    models = write_models(tmp_path / "models.json", {"name": "a", "engine": {"model": "./weights"}})
    state = tmp_path / "state"
    up = ("up", "--detach", "--models", models, "--engine", "vllm", "--state-dir", state)
    done = redmesh(*up, env={"REDMESH_ENGINE_PYTHON": str(tmp_path / "no-python")})
    refused(done, 2, "--engine vllm", "no-python", "make engine", "REDMESH_ENGINE_PYTHON")
    assert not (state / "mesh.json").exists()


@pytest.mark.parametrize("version", ["2", "nonsense"])
def test_data_of_another_schema_is_left_alone(tmp_path: Path, version: str) -> None:
    """Nothing starts on data of another schema version, and the data stays as it is."""
    with redis_server() as url:
        _redis(url, "SET", "redmesh:{ctl}:schema", version)
        words = ("schema version", version, "REDMESH_KEY_PREFIX")
        for service in SERVICES:
            env = {"REDMESH_REDIS_URL": url}
            refused(serve(service, tmp_path, env, *_own_ports(service)), 1, *words)
        for command in (("get", "replicas"), ("audit",)):
            refused(redmesh(*command, "--redis-url", url), 1, *words)
        assert _redis(url, "GET", "redmesh:{ctl}:schema") == version
        assert _redis(url, "DBSIZE") == "1"


def _redis(url: str, *command: str) -> str:
    async def act() -> str:
        connection = await connect(CommonSettings(redis_url=Secret(url)))
        try:
            return text_of(await connection.command(*command))
        finally:
            await connection.aclose()

    return asyncio.run(act())


def test_up_stops_what_it_started_when_a_model_cannot_start(tmp_path: Path) -> None:
    """A model whose engine dies at its start ends `up` with the reason, and nothing is left."""
    models = write_models(tmp_path / "models.json", sim_model("broken", args=["--speed", "0"]))
    state = tmp_path / "state"
    up = ("up", "--detach", "--models", models, "--engine", "sim", "--state-dir", state)
    done = redmesh(*up, "--port", str(free_ports(2)), "--timeout", "40", timeout_s=100)
    refused(done, 1, "broken", "--speed must be above 0")
    assert not (state / "mesh.json").exists()
