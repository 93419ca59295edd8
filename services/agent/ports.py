"""Ports for engines: stable for a replica, checked by binding.

The search for a free port starts at a place that the replica's id decides, so that two agents on
one machine with one range hardly ever try the same port in the same second.
"""

import errno
import socket
import zlib
from collections.abc import Collection

from shared.errors import EngineError


def choose_port(
    rid: str, ports: range, taken: Collection[int], host: str, preferred: int = 0
) -> int:
    """Return a port of `ports` that can be bound on `host`; `preferred` if it is free.

    `taken` are ports of this agent's other engines, which may not have bound theirs yet.
    Raises `EngineError` when none is free or `host` is not an address of this machine.
    """
    first = zlib.crc32(rid.encode()) % len(ports)
    order = [*ports[first:], *ports[:first]]
    if preferred in ports:
        order.insert(0, preferred)
    for port in order:
        if port not in taken and _is_free(host, port):
            return port
    raise EngineError(
        f"no free port in {ports.start}-{ports.stop - 1} on {host}: widen REDMESH_PORT_RANGE"
    )


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in {errno.EADDRINUSE, errno.EACCES}:
                return False
            raise EngineError(
                f"engines cannot bind {host!r}: {error.strerror}; set REDMESH_ENGINE_HOST"
            ) from error
    return True
