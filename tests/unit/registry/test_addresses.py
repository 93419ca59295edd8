"""The URL of Redis: three topologies, several hosts, and no password in any text."""

import pytest

from shared.errors import InvalidInputError
from shared.registry.addresses import Topology, parse, shown_url


def test_one_server() -> None:
    """A plain URL is one server, with all its options kept for the client library."""
    address = parse("rediss://u:p%40ss@h:1/2?ssl_ca_certs=/x")
    assert address.topology is Topology.SINGLE
    assert address.nodes == (("h", 1),)
    assert address.plain_url == "rediss://u:p%40ss@h:1/2?ssl_ca_certs=%2Fx"


def test_sentinels() -> None:
    """Several Sentinels, the primary's name, a database, and a login for the Sentinels alone."""
    url = "redis+sentinel://u:p@a,b:5000,[::1]:7/mymaster/3?sentinel_password=s&socket_timeout=1"
    address = parse(url)
    assert address.topology is Topology.SENTINEL
    assert address.nodes == (("a", 26379), ("b", 5000), ("::1", 7))
    assert address.service == "mymaster"
    assert address.sentinel_login == {"password": "s"}
    assert address.plain_url == "redis://u:p@a:26379/3?socket_timeout=1"


def test_cluster() -> None:
    """Any nodes of a cluster may be named, so that one may be down at the start."""
    address = parse("rediss+cluster://:p@a:1,b")
    assert address.topology is Topology.CLUSTER
    assert address.nodes == (("a", 1), ("b", 6379))
    assert address.plain_url == "rediss://:p@a:1"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis+sentinel://:secret@a:1,b:2", "lacks the name of the primary"),
        ("redis+sentinel://:secret@a:1/", "lacks the name of the primary"),
        ("redis://:secret@a:1,b:2/0", "several hosts"),
        ("redis+cluster://:secret@a:one", "its hosts do not parse"),
        ("redis+other://:secret@a", "use redis://"),
        (":secret@a", "use redis://"),
    ],
)
def test_a_url_that_makes_no_sense_says_what_is_meant(url: str, words: str) -> None:
    """A refused URL is answered with the form that is wanted, and never repeated."""
    with pytest.raises(InvalidInputError, match="redis_url") as error:
        parse(url)
    assert words in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rediss://u:p@h:1/2?x=y", "rediss://h:1/2"),
        ("redis://:p@[::1]:5", "redis://[::1]:5"),
        ("redis+sentinel://u:p@a:1,b:2/name?sentinel_password=s", "redis+sentinel://a:1,b:2/name"),
        ("redis://h:nonsense", "an invalid URL"),
    ],
)
def test_what_is_shown_holds_no_secret(url: str, shown: str) -> None:
    """What is shown of a URL has no user, no password and no query."""
    assert shown_url(url) == shown
