"""Looks at what a test left in Redis: every key documented, of its type, and with a TTL if due."""

import re
from collections.abc import Iterable
from typing import Any, Protocol

from shared.registry.keys import EXPIRING_KEYS, FLEET_KEYS, MODEL_KEYS, STREAM_KEYS

_KEY = re.compile(r"(?P<prefix>[^{}]*):\{(?P<tag>[^{}]+)\}:(?P<suffix>.+)")


class Asking(Protocol):
    """A blocking client that runs one command."""

    def command(self, *parts: str | int) -> Any:  # noqa: ANN401 - any reply
        """Run one command."""
        ...


def documented(tag: str, suffix: str) -> tuple[str, str] | None:
    """Find the documented name and type of a key, or None."""
    if tag.startswith("s:") and suffix in STREAM_KEYS:
        return f"{{s:<id>}}:{suffix}", STREAM_KEYS[suffix]
    known = FLEET_KEYS if tag == "ctl" else MODEL_KEYS
    for name, kind in known.items():
        fixed, placeholder, _ = name.partition("<")
        if suffix == name or (placeholder and suffix.startswith(fixed) and suffix != fixed):
            return f"{{{tag if tag == 'ctl' else 'M'}}}:{name}", kind
    return None


def key_problems(servers: Iterable[Asking], prefix: str) -> list[str]:
    """Say what is wrong with the keys under `prefix`."""
    problems: list[str] = []
    for server in servers:
        for raw in server.command("KEYS", f"{prefix}:*"):
            key = raw.decode()
            match = _KEY.fullmatch(key)
            found = documented(match["tag"], match["suffix"]) if match else None
            if found is None:
                problems.append(f"{key}: not documented")
                continue
            name, kind = found
            actual = server.command("TYPE", key).decode()
            ttl_ms = server.command("PTTL", key)
            if actual not in {kind, "none"}:
                problems.append(f"{key}: a {actual}, documented as {kind}")
            if name in EXPIRING_KEYS and ttl_ms == -1:
                problems.append(f"{key}: has no TTL and must have one")
            if name not in EXPIRING_KEYS and ttl_ms >= 0:
                problems.append(f"{key}: has a TTL and must have none")
    return problems
