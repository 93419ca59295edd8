"""The agent's part in rebuilding what is declared: a copy on disk of what it has read.

Redis may come back empty, and every controller may have been started anew with it. Then the copies
of the agents are the only memory of what operators declared. A copy belongs to one Redis and one
key prefix: an agent that was moved to another fleet brings nothing along.
"""

import asyncio
from pathlib import Path
from typing import Final

import msgspec
import structlog

from shared.errors import RegistryError
from shared.models.catalogue import Catalogue
from shared.registry import Registry
from shared.registry.memory import Memory

NAME: Final = "declared.json"
REMEMBER_S: Final = 2.0

_log = structlog.get_logger(__name__)


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the file."""

    redis: str
    """Where the registry is, without user and password."""
    key_prefix: str
    catalogue: Catalogue


class Remembering:
    """Keeps the copy true, and mends the registry by it. One of each agent process."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / NAME
        self._memory: Memory | None = None
        self._kept: Catalogue | None = None
        self._ended = False

    async def refresh(self, registry: Registry | None) -> None:
        """Read what is declared, mend what was lost, and keep a copy; never raises."""
        if registry is None or self._ended:
            return
        try:
            if self._memory is None:
                known = await asyncio.to_thread(self._read, registry)
                self._memory = Memory(registry.fleet, known)
            await self._memory.refresh()
            if self._memory.catalogue != self._kept:
                await asyncio.to_thread(self._write, registry, self._memory.catalogue)
                self._kept = self._memory.catalogue
        except RegistryError as error:
            _log.debug("declarations_not_read", error=str(error))
        except OSError as error:
            _log.warning("declarations_not_kept", path=str(self._path), error=str(error))

    def forget(self) -> None:
        """Drop the copy: this host has left its fleet in good order."""
        self._ended = True
        self._path.unlink(missing_ok=True)

    def _read(self, registry: Registry) -> Catalogue | None:
        try:
            copy = msgspec.json.decode(self._path.read_bytes(), type=Copy)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            _log.warning("declarations_not_remembered", path=str(self._path), error=str(error))
            return None
        here = (registry.connection.shown_url, registry.keys.prefix)
        return copy.catalogue if (copy.redis, copy.key_prefix) == here else None

    def _write(self, registry: Registry, catalogue: Catalogue) -> None:
        copy = Copy(
            redis=registry.connection.shown_url,
            key_prefix=registry.keys.prefix,
            catalogue=catalogue,
        )
        beside = self._path.with_suffix(".new")
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(copy)))
        beside.replace(self._path)
