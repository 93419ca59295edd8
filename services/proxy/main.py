"""The proxy as a process: put together, run, drained and ended.

`run` returns the exit code: 0 after an orderly end, 1 when the world lacks what is needed.
"""

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import structlog
import uvloop

from services.proxy.server import bind
from services.proxy.service import Service
from services.proxy.settings import ProxySettings
from services.proxy.table import Tables
from services.proxy.tablefile import TableFile
from services.proxy.workers.parent import Parent
from services.proxy.workers.tie import Tie
from shared import logs
from shared.errors import InvalidInputError, RedmeshError, RegistryUnavailableError
from shared.ids import check_name, new_suffix
from shared.registry import Registry, open_registry

MAX_WORKERS: Final = 256
LAST_PORT: Final = 65_535

_log = structlog.get_logger(__name__)


def run(settings: ProxySettings, tie: Tie | None = None) -> int:
    """Run a proxy until SIGTERM or SIGINT; return the exit code. A worker has a `tie`.

    Raises InvalidInputError when the settings make no sense.
    """
    _check(settings)
    logs.configure(level=settings.log_level, style=settings.log_format, service="proxy")
    try:
        if settings.workers > 1:
            return asyncio.run(_supervise(settings))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, os.environ, tie))
    except (RedmeshError, OSError) as error:
        sys.stderr.write(f"redmesh proxy: {error}\n")
        return 1
    return 0


def _check(settings: ProxySettings) -> None:
    if not 1 <= settings.workers <= MAX_WORKERS:
        raise InvalidInputError(
            f"REDMESH_WORKERS={settings.workers}: use 1 to {MAX_WORKERS}, at most one for each core"
        )
    if settings.workers > 1 and settings.admin_port + settings.workers > LAST_PORT:
        raise InvalidInputError(
            f"REDMESH_ADMIN_PORT={settings.admin_port}: {settings.workers} workers need as many "
            f"ports after it, and the last one is {LAST_PORT}: choose a lower one"
        )


async def _supervise(settings: ProxySettings) -> int:
    return await Parent(settings, os.environ).run()


async def _serve(settings: ProxySettings, environ: Mapping[str, str], tie: Tie | None) -> None:
    listening = bind(settings.host, settings.port, shared=tie is not None)
    port = listening.getsockname()[1]
    name = settings.proxy_name or f"px-{settings.host_name}-{port}"
    if tie is not None:
        name = f"{name}-w{tie.slot}"
    proxy = check_name("proxy_name", f"{name}-{new_suffix()}")
    tables = Tables()
    file = TableFile(Path(settings.state_dir)) if settings.state_dir else None
    try:
        hot, calm = await _open(settings, tables, file)
    except BaseException:
        listening.close()
        raise
    try:
        service = Service(settings, environ, proxy, tables, file, hot, calm)
        if tie is None:
            await service.run(listening, port)
        else:
            async with tie:
                await service.run(listening, port, tie)
    finally:
        await hot.aclose()
        await calm.aclose()


async def _open(
    settings: ProxySettings, tables: Tables, file: TableFile | None
) -> tuple[Registry, Registry]:
    """Open Redis; while it is away, a copy of the tables is enough to begin with."""
    kept = file.read() if file is not None else None
    try:
        calm = await open_registry(settings)
    except RegistryUnavailableError as error:
        if kept is None or not _restored(tables, kept):
            raise
        _log.warning("redis_away_at_start", error=str(error), models=len(tables))
        return (
            await open_registry(settings, hot=True, prove=False),
            await open_registry(settings, prove=False),
        )
    try:
        hot = await open_registry(settings, hot=True)
    except BaseException:
        await calm.aclose()
        raise
    if kept is not None:
        _restored(tables, kept)
    return hot, calm


def _restored(tables: Tables, kept: bytes) -> bool:
    try:
        tables.restore(kept)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        _log.warning("table_copy_not_read", error=str(error))
        return False
    return len(tables) > 0
