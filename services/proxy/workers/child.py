"""One worker as its parent knows it: a process, who it said it is, and what it showed last."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Mapping
from typing import Final, Self

import msgspec
import structlog

from services.proxy.settings import ProxySettings
from services.proxy.workers.merging import LivePage, Page, read_page
from services.proxy.workers.rules import worker_admin_port
from services.proxy.workers.tie import Announcement
from shared.admin import fetch
from shared.secret import Secret
from shared.settings import variable

ASK_DEADLINE_S: Final = 1.0

_log = structlog.get_logger(__name__)


def environment(
    settings: ProxySettings, environ: Mapping[str, str], slot: int, port: int
) -> dict[str, str]:
    """Give a worker its settings: the parent's, whether they came by flags or environment.

    Secrets never come by flags, so they are in `environ` already, or in the files that it names.
    """
    mine = {
        "admin_port": worker_admin_port(settings.admin_port, slot),
        "port": port,
        "workers": 1,
    }
    given = dict(environ)
    for name in ProxySettings.__struct_fields__:
        value = mine.get(name, getattr(settings, name))
        if not isinstance(value, Secret):
            given[variable(name)] = str(value)
    return given


class Child:
    """One worker process."""

    def __init__(self, process: asyncio.subprocess.Process, tie: asyncio.StreamWriter) -> None:
        self._process = process
        self._tie = tie
        self.said: Announcement | None = None
        """Who it is, once it is up."""
        self.page: Page = ()
        """Its metrics, as it showed them last."""

    @classmethod
    async def start(
        cls, slot: int, environ: Mapping[str, str], metrics_url: str
    ) -> tuple[Self, asyncio.StreamReader]:
        """Start a worker; raises OSError.

        In a session of its own: Ctrl-C in a terminal reaches the parent only, which passes it on
        once.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                fd = theirs.fileno()
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "services.proxy.worker"),
                    *(str(fd), str(slot), metrics_url),
                    stdin=asyncio.subprocess.DEVNULL,
                    env=dict(environ),
                    pass_fds=(fd,),
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, writer), reader

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def hear(self, reader: asyncio.StreamReader) -> bool:
        """Wait until it is up and says who it is; False if it ends before."""
        try:
            self.said = msgspec.json.decode(await reader.readline(), type=Announcement)
        except (OSError, ValueError):
            return False
        return True

    async def ended(self) -> int:
        """Wait for its end; return the exit code."""
        code = await self._process.wait()
        self._tie.close()
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; one that has ended is no error."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def is_ready(self) -> bool:
        """Ask whether it may get traffic."""
        return await self._ask("/health/ready") is not None

    async def read_metrics(self) -> bool:
        """Ask for its metrics into `page`; False if it did not answer."""
        body = await self._ask("/metrics")
        if body is None:
            return False
        try:
            self.page = read_page(body.decode())
        except ValueError as error:
            _log.warning("worker_metrics_not_read", pid=self.pid, error=str(error))
            return False
        return True

    async def live(self) -> LivePage | None:
        """Ask for its live requests; None if it did not answer."""
        body = await self._ask("/live/requests")
        try:
            return None if body is None else msgspec.json.decode(body, type=LivePage)
        except ValueError as error:
            _log.warning("worker_requests_not_read", pid=self.pid, error=str(error))
            return None

    async def _ask(self, path: str) -> bytes | None:
        if self.said is None:
            return None
        try:
            return await fetch(self.said.admin_url + path, deadline_s=ASK_DEADLINE_S)
        except (OSError, ValueError):
            return None
