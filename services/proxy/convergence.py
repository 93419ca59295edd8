"""Keeping the routing tables equal to the registry: hints for speed, snapshots for truth.

A hint that follows on the table's version is applied at once. Anything else (a gap, a
resubscription, a foreign version in any reply) asks for a snapshot: one read at a time per model,
with a little jitter so that a fleet of proxies does not read in step. The catalogue of declared
models is read every few seconds, and at once when a hint names a model that is not in it.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from random import Random
from typing import Final, Protocol

import structlog

from services.proxy.table import Tables
from services.proxy.tablefile import TableFile
from shared.errors import CorruptRecordError, RegistryError
from shared.models.deployment import Deployment
from shared.models.routing import Snapshot
from shared.registry.routes import RouteHint, RoutesReset

CATALOGUE_S: Final = (1.5, 2.5)
JITTER_S: Final = 0.2
AGAIN_S: Final = 0.5
KEEP_S: Final = 1.0
NAMED: Final = 10
"""So many records that do not parse are named in the log: there may be a million."""

_log = structlog.get_logger(__name__)


class Catalogue(Protocol):
    """Where the declared models are read."""

    async def deployments(self) -> Mapping[str, Deployment]:
        """Read them all."""
        ...


class Snapshots(Protocol):
    """Where a model's snapshot is read."""

    async def snapshot(self, model: str) -> Snapshot:
        """Read one."""
        ...


class Hints(Protocol):
    """Where hints come from."""

    def hints(self) -> AsyncIterator[RouteHint | RoutesReset]:
        """Yield them for ever."""
        ...


class Convergence:
    """Keeps `tables` equal to the registry, by loops that the service runs."""

    def __init__(
        self,
        *,
        tables: Tables,
        catalogue: Catalogue,
        snapshots: Snapshots,
        hints: Hints,
        random: Random,
        table_file: TableFile | None,
    ) -> None:
        self._tables = tables
        self._catalogue = catalogue
        self._snapshots = snapshots
        self._hints = hints
        self._random = random
        self._file = table_file
        self._stale: set[str] = set()
        self._reading: set[str] = set()
        self._stale_now = asyncio.Event()
        self._catalogue_now = asyncio.Event()
        self._kept = b""

    def refresh(self, model: str) -> None:
        """Ask for a snapshot of `model`, soon."""
        self._stale.add(model)
        self._stale_now.set()

    async def run_hints(self) -> None:
        """Apply hints, for ever."""
        async for hint in self._hints.hints():
            if isinstance(hint, RoutesReset):
                self._catalogue_now.set()
                for table in self._tables.models():
                    self.refresh(table.model)
            elif self._tables.get(hint.model) is None:
                self._catalogue_now.set()
            elif not self._tables.apply_hint(
                hint.model, hint.prev, hint.ver, hint.rid, hint.replica
            ):
                self.refresh(hint.model)

    async def run_catalogue(self) -> None:
        """Read the catalogue every few seconds and when asked to, for ever."""
        while True:
            try:
                await self.read_catalogue()
            except RegistryError as error:
                _log.warning("catalogue_not_read", error=str(error))
            try:
                async with asyncio.timeout(self._random.uniform(*CATALOGUE_S)):
                    await self._catalogue_now.wait()
            except TimeoutError:
                pass
            self._catalogue_now.clear()

    async def read_catalogue(self) -> None:
        """Read the catalogue once, and the snapshots of models that are new."""
        deployments = await self._catalogue.deployments()
        now_s = asyncio.get_running_loop().time()
        unread = self._tables.apply_catalogue(deployments, now_s)
        for model in unread:
            try:
                await self._read(model)
            except CorruptRecordError as error:
                # One model's trouble: the others are served, and it is read again next time.
                _log.error("model_not_read", model=model, error=str(error))
        self._tables.catalogued = True

    async def run_snapshots(self) -> None:
        """Read the snapshots that were asked for, one at a time per model, for ever."""
        async with asyncio.TaskGroup() as readers:
            while True:
                await self._stale_now.wait()
                self._stale_now.clear()
                for model in self._stale - self._reading:
                    self._stale.discard(model)
                    self._reading.add(model)
                    readers.create_task(self._read_soon(model))

    async def run_copies(self) -> None:
        """Keep the copy on disk up to date, for ever."""
        file = self._file
        if file is None:
            return
        while True:
            await asyncio.sleep(KEEP_S)
            content = self._tables.store()
            if content in {self._kept, b"{}"}:
                continue
            try:
                await asyncio.to_thread(file.write, content)
            except OSError as error:
                _log.warning("table_not_kept", path=str(file.path), error=str(error))
            self._kept = content

    async def _read_soon(self, model: str) -> None:
        try:
            await asyncio.sleep(self._random.uniform(0, JITTER_S))
            await self._read(model)
        except RegistryError as error:
            _log.warning("snapshot_not_read", model=model, error=str(error))
            await asyncio.sleep(AGAIN_S)
            self._stale.add(model)
        finally:
            self._reading.discard(model)
            if self._stale:
                self._stale_now.set()

    async def _read(self, model: str) -> None:
        snapshot = await self._snapshots.snapshot(model)
        if snapshot.corrupt:
            bad = snapshot.corrupt
            _log.error("replicas_not_parsed", model=model, count=len(bad), rids=bad[:NAMED])
        if not self._tables.apply_snapshot(snapshot):
            _log.debug("snapshot_not_authoritative", model=model, ver=snapshot.ver)
