"""Where Redis is: the URL that an operator gives, taken apart.

Three topologies: one server (`redis://`), a primary that Sentinels know (`redis+sentinel://`) and a
Redis Cluster (`redis+cluster://`); each with TLS as `rediss…`. The latter two may name several
hosts, because any one of them may be down when a service starts.
"""

from enum import StrEnum
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

import msgspec

from shared.errors import InvalidInputError

SCHEMES: Final = (
    "redis",
    "rediss",
    "redis+sentinel",
    "rediss+sentinel",
    "redis+cluster",
    "rediss+cluster",
)
INVALID: Final = "an invalid URL"
PORT: Final = 6379
SENTINEL_PORT: Final = 26379
_SENTINEL_OPTIONS: Final = ("sentinel_username", "sentinel_password")


class Topology(StrEnum):
    """How the primary of a key is found."""

    SINGLE = "single"
    """It is the one server of the URL; a name may point elsewhere after a failover."""
    SENTINEL = "sentinel"
    """Sentinels tell."""
    CLUSTER = "cluster"
    """The nodes tell, slot by slot."""


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed URL."""

    topology: Topology
    nodes: tuple[tuple[str, int], ...]
    """Host and port: of the server, of Sentinels, or of some nodes of the cluster."""
    service: str
    """Sentinel only: the name under which Sentinels know the primary."""
    plain_url: str
    """The same as a URL of scheme redis or rediss to the first node: what options it has."""
    sentinel_login: dict[str, str]
    """Sentinel only: `username` and `password` of the Sentinels themselves, if they want any."""


def parse(url: str) -> Address:
    """Take a URL apart; raise `InvalidInputError` that never shows what may be a password."""
    scheme, given, _ = url.partition("://")
    if scheme not in SCHEMES or not given:
        of_scheme = f" of scheme {scheme[:20]!r}" if given else ""
        raise InvalidInputError(
            f"redis_url{of_scheme} is not a Redis URL: use "
            f"{', '.join(f'{name}://' for name in SCHEMES)} followed by HOST:PORT",
            field="redis_url",
        )
    plain_scheme, _, kind = scheme.partition("+")
    topology = Topology(kind) if kind else Topology.SINGLE
    try:
        authority, parts = _split(url)
        nodes = _nodes(authority, SENTINEL_PORT if topology is Topology.SENTINEL else PORT)
    except ValueError:
        raise InvalidInputError(
            "redis_url is not valid: its hosts do not parse. Use "
            f"{scheme}://HOST:PORT{',HOST:PORT' if kind else ''}",
            field="redis_url",
        ) from None
    first, several = nodes[0], bool(nodes[1:])
    if several and topology is Topology.SINGLE:
        raise InvalidInputError(
            "redis_url names several hosts: that takes redis+sentinel:// or redis+cluster://",
            field="redis_url",
        )
    path, service = parts.path, ""
    if topology is Topology.SENTINEL:
        service, _, database = unquote(parts.path).strip("/").partition("/")
        path = f"/{database}" if database else ""
        if not service:
            raise InvalidInputError(
                "redis_url of scheme redis+sentinel lacks the name of the primary: use "
                "redis+sentinel://HOST:PORT,HOST:PORT/NAME, with the NAME of `sentinel monitor`",
                field="redis_url",
            )
    options = parse_qsl(parts.query, keep_blank_values=True)
    login = {name.partition("_")[2]: text for name, text in options if name in _SENTINEL_OPTIONS}
    query = urlencode([pair for pair in options if pair[0] not in _SENTINEL_OPTIONS])
    user, at, _ = authority.rpartition("@")
    return Address(
        topology=topology,
        nodes=nodes,
        service=service,
        plain_url=f"{plain_scheme}://{user}{at}{_shown_node(*first)}{path}"
        + (f"?{query}" if query else ""),
        sentinel_login=login,
    )


def shown_url(url: str) -> str:
    """Return the URL without user, password and query."""
    try:
        authority, parts = _split(url)
        nodes = _nodes(authority, 0)
    except ValueError:
        return INVALID
    return f"{parts.scheme}://{','.join(_shown_node(*node) for node in nodes)}{parts.path}"


def _split(url: str) -> tuple[str, SplitResult]:
    """Give the authority of a URL, and its other parts; raises ValueError.

    `urlsplit` refuses several hosts of which one is in brackets: since 3.11.4, and as Debian
    patches it.
    """
    scheme, _, rest = url.partition("://")
    end = min((at for mark in "/?#" if (at := rest.find(mark)) >= 0), default=len(rest))
    return rest[:end], urlsplit(f"{scheme}://{rest[end:]}")


def _nodes(authority: str, default_port: int) -> tuple[tuple[str, int], ...]:
    """Read the hosts of a URL; raises ValueError."""
    hosts = authority.rpartition("@")[2]
    found = [urlsplit(f"//{host}") for host in hosts.split(",")]
    return tuple((each.hostname or "", each.port or default_port) for each in found)


def _shown_node(host: str, port: int) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"{shown}:{port}" if port else shown
