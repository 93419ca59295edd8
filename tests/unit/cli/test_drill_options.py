"""Options of drills: what they mean, and what is said when they mean nothing."""

import pytest

from services.cli.drill import options
from services.cli.drill.options import LoadWish, Target
from services.cli.drill.records import Budget
from services.cli.main import main
from shared.errors import InvalidInputError

Captured = pytest.CaptureFixture[str]
PROMISED = (
    "replica-kill",
    "replica-freeze",
    "agent-kill",
    "host-loss",
    "proxy-kill",
    "proxy-drain",
    "controller-failover",
    "controller-freeze",
    "redis-restart",
    "redis-empty",
    "redis-failover",
    "redis-away",
    "partition-proxy-redis",
    "partition-proxy-replica",
    "rolling-upgrade",
)


def test_a_budget_is_changed_in_parts() -> None:
    """Parts that are given replace the drill's own; the others stay."""
    base = Budget(recover_s=1.0, drift_s=10.0)
    changed = options.budget("failed=2, recover_s=10", base)
    assert (changed.failed, changed.recover_s, changed.drift_s) == (2, 10.0, 10.0)
    assert options.budget("", base) == base
    assert options.budget("resent=3", base).resent == 3


def test_load_is_users_or_rate_or_live() -> None:
    """Each way to say the load gives that load, and says so in words."""
    assert options.load("") == LoadWish()
    assert options.load("users=3,tokens=9") == LoadWish(users=3, tokens=9)
    assert options.load("rate=2.5") == LoadWish(rate=2.5)
    assert options.load("live").live
    assert "2.5 streams a second" in options.load("rate=2.5").told()
    assert "3 users" in options.load("users=3").told()
    assert "live traffic" in options.load("live").told()


def test_targets_add_up() -> None:
    """Several options, and several parts of one, name one target."""
    assert options.target(["model=m,host=h", "proxy=p"]) == Target(model="m", host="h", proxy="p")


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--budget", "failed"),
        ("--budget", "failed=x"),
        ("--budget", "failed=-1"),
        ("--budget", "spare_own=1"),
        ("--load", "dead"),
        ("--load", "users=0"),
        ("--load", "users=2,rate=2"),
        ("--load", "rate=0"),
        ("--load", "rate=nan"),
        ("--load", "tokens=1e99"),
        ("--target", "m"),
        ("--target", "model="),
        ("--target", "color=red"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_asked(
    option: str, text: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong part ends with exit code 2 and its option's name, without looking for a mesh."""
    assert main(["drill", "run", "replica-kill", option, text]) == 2
    out, err = capsys.readouterr()
    assert (out, "Traceback" in err) == ("", False)
    assert option in err


def test_an_unknown_drill_is_told_the_known_ones(capsys: Captured) -> None:
    """The message for a wrong name lists the names there are."""
    assert main(["drill", "run", "replica-kil"]) == 2
    err = capsys.readouterr().err
    assert "'replica-kil'" in err
    assert "replica-kill" in err


def test_the_list_names_every_drill(capsys: Captured) -> None:
    """`drill list` names the drills that are promised, each with its fault."""
    assert main(["drill", "list"]) == 0
    out = capsys.readouterr().out
    for name in PROMISED:
        assert name in out


def test_budget_errors_name_the_option() -> None:
    """The error carries the option it is about."""
    with pytest.raises(InvalidInputError) as caught:
        options.budget("recover_s=soon", Budget())
    assert caught.value.field == "--budget"
