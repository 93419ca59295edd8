"""The copy of the routing tables on disk: a proxy that restarts while Redis is away still serves.

Written beside the target and renamed over it, so that a crash never leaves half a file. Workers
share one copy: each writes beside it under a name of its own, and the last one wins.
"""

import os
from pathlib import Path
from typing import Final

NAME: Final = "routes.json"


class TableFile:
    """One file in the proxy's state directory."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / NAME

    @property
    def path(self) -> Path:
        """Where the copy is."""
        return self._path

    def read(self) -> bytes | None:
        """Return the copy, or None if there is none that can be read."""
        try:
            return self._path.read_bytes()
        except OSError:
            return None

    def write(self, content: bytes) -> None:
        """Replace the copy; raises OSError."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = self._path.with_suffix(f".{os.getpid()}.new")
        beside.write_bytes(content)
        beside.replace(self._path)
