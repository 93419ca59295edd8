"""Keys: built in one place, in one slot each, and documented."""

import re
from pathlib import Path

import pytest

from shared.errors import InvalidInputError
from shared.registry.keys import (
    EXPIRING_KEYS,
    FLEET_KEYS,
    MODEL_KEYS,
    STREAM_KEYS,
    FleetKeys,
    Keys,
    ModelKeys,
)
from tests.support.keycheck import documented

KNOWN = {"M": MODEL_KEYS, "ctl": FLEET_KEYS, "s:<id>": STREAM_KEYS}
DOCUMENT = Path(__file__).parents[3] / "docs" / "redis.md"
ROW = re.compile(
    r"^\| `redmesh:\{(?P<tag>M|ctl|s:<id>)\}:(?P<suffix>[^`]+)` \|(?P<rest>.*)\|$", re.MULTILINE
)


def rows() -> dict[tuple[str, str], list[str]]:
    """Read the tables of keys in the document: (tag, suffix) → the other columns."""
    return {
        (found["tag"], found["suffix"]): [cell.strip() for cell in found["rest"].split("|")]
        for found in ROW.finditer(DOCUMENT.read_text())
    }


def test_every_key_is_documented() -> None:
    """docs/redis.md has a row for every key of every model and of the fleet, and for no other."""
    known = {(tag, suffix) for tag, suffixes in KNOWN.items() for suffix in suffixes}
    assert set(rows()) == known


def test_documented_types_and_ttls() -> None:
    """The document's type and TTL of each key are those of the code."""
    for (tag, suffix), cells in rows().items():
        kind, _holds, writer, ttl = cells
        assert kind == KNOWN[tag][suffix]
        assert writer
        assert (ttl != "–") == (f"{{{tag}}}:{suffix}" in EXPIRING_KEYS), suffix


def test_channel_is_documented() -> None:
    """The document names the channel of hints."""
    assert "`redmesh:routes:<model>`" in DOCUMENT.read_text()
    assert Keys().routes_channel("m") == "redmesh:routes:m"


def test_model_keys() -> None:
    """A model's keys share its hash tag, and each documented key is an attribute."""
    keys = Keys("red").model("org/llama3:8b")
    for suffix in MODEL_KEYS:
        if "<" not in suffix:
            assert getattr(keys, suffix) == f"red:{{org/llama3:8b}}:{suffix}"
    assert keys.lease("px-1") == "red:{org/llama3:8b}:lease:px-1"
    assert keys.pick(("ver", "lease:<proxy>"), "p") == (keys.ver, keys.lease("p"))


def test_fleet_keys() -> None:
    """The fleet's keys share the tag ctl, and each documented key is an attribute."""
    keys = Keys("red").fleet
    for suffix in FLEET_KEYS:
        if "<" not in suffix:
            assert getattr(keys, suffix) == f"red:{{ctl}}:{suffix}"
    assert keys.orders("h1") == "red:{ctl}:orders:h1"
    assert keys.pick(("epoch", "orders:<host>"), "h") == (keys.epoch, keys.orders("h"))


def test_stream_keys() -> None:
    """A stream's keys share its tag; what is no id, also one in capitals, makes no key."""
    keys = Keys("red").stream("0f" * 16)
    for suffix in STREAM_KEYS:
        assert getattr(keys, suffix) == f"red:{{s:{'0f' * 16}}}:{suffix}"
    assert keys.pick(("tokens", "meta")) == (keys.tokens, keys.meta)
    for stream in ("", "0F" * 16, "0f" * 15, "0f" * 16 + "\n", "g" * 32, "}{" * 16):
        with pytest.raises(InvalidInputError, match="32 hexadecimal"):
            Keys().stream(stream)


@pytest.mark.parametrize("name", ["", "a}:{b", "a b", "é", "-a", "a" * 129, "a\n", "{ctl}"])
def test_hostile_names_make_no_key(name: str) -> None:
    """A name that could move a key to another slot is refused before any key exists."""
    for build in (
        Keys("p").model,
        Keys("p").model("m").lease,
        Keys("p").fleet.orders,
        Keys("p").routes_channel,
        Keys,
    ):
        with pytest.raises(InvalidInputError):
            build(name)


def test_documented_knows_its_own() -> None:
    """The leak checker knows every key that the builders make, and no key beside them."""
    model, fleet = ModelKeys("p", "m"), FleetKeys("p")
    assert documented("m", model.lease("p1").split(":", 2)[2]) == ("{M}:lease:<proxy>", "hash")
    assert documented("ctl", fleet.orders("h").split(":", 2)[2]) == ("{ctl}:orders:<host>", "hash")
    assert documented("m", "leases") is None
    assert documented("m", "lease:") is None
    assert documented("ctl", "ready") is None
    assert documented("s:" + "0" * 32, "tokens") == ("{s:<id>}:tokens", "stream")
    assert documented("s:" + "0" * 32, "token") is None
