from pathlib import Path

import pytest

from shared.errors import InvalidInputError
from shared.secret import Secret, replica_api_key
from shared.settings import CommonSettings, load


def test_defaults_need_no_environment() -> None:
    """With nothing set, the settings are usable defaults on loopback."""
    settings = load(CommonSettings, {})
    assert settings.redis_url.reveal() == "redis://127.0.0.1:6379/0"
    assert settings.key_prefix == "redmesh"


def test_flags_win_over_the_environment() -> None:
    """A flag's value is taken before the variable; a flag that was not given is not."""
    environ = {"REDMESH_KEY_PREFIX": "env", "REDMESH_HOST_NAME": "h1"}
    settings = load(CommonSettings, environ, {"key_prefix": "flag", "host_name": None})
    assert (settings.key_prefix, settings.host_name) == ("flag", "h1")


def test_all_problems_are_reported_at_once() -> None:
    """Every wrong value is named with its variable in one error."""
    environ = {
        "REDMESH_KEY_PREFIX": "a b",
        "REDMESH_LOG_LEVEL": "loud",
        "REDMESH_HOST_NAME": "{x}",
    }
    with pytest.raises(InvalidInputError) as caught:
        load(CommonSettings, environ)
    text = str(caught.value)
    assert all(name in text for name in environ)
    assert "use one of debug, info, warning, error" in text


def test_a_secret_comes_from_a_file(tmp_path: Path) -> None:
    """A secret may be read from the file that its variable with _FILE names."""
    path = tmp_path / "url"
    path.write_text("redis://:hunter2@127.0.0.1:1/0\n")
    settings = load(CommonSettings, {"REDMESH_REDIS_URL_FILE": str(path)})
    assert settings.redis_url.reveal() == "redis://:hunter2@127.0.0.1:1/0"
    assert "hunter2" not in repr(settings)


def test_a_secret_given_twice_or_missing_is_refused(tmp_path: Path) -> None:
    """A value and a file together, or a file that is not there, are errors that name the remedy."""
    both = {"REDMESH_FLEET_SECRET": "x", "REDMESH_FLEET_SECRET_FILE": str(tmp_path / "y")}
    with pytest.raises(InvalidInputError, match="both set"):
        load(CommonSettings, both)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load(CommonSettings, {"REDMESH_FLEET_SECRET_FILE": str(tmp_path / "none")})


def test_a_secret_never_shows_itself() -> None:
    """Neither str nor repr nor formatting shows a secret."""
    secret = Secret("hunter2")
    assert "hunter2" not in f"{secret} {secret!r} {[secret]}"
    assert secret.reveal() == "hunter2"
    assert secret == Secret("hunter2")
    assert secret != Secret("hunter3")


def test_engine_keys_differ_by_replica_and_incarnation() -> None:
    """Each incarnation of each replica has its own key; the same input gives the same key."""
    secret = Secret("fleet")
    keys = {replica_api_key(secret, rid, gen) for rid in ("a", "b") for gen in (1, 2)}
    assert len(keys) == 4
    assert replica_api_key(secret, "a", 1) in keys
    assert replica_api_key(Secret("other"), "a", 1) not in keys
