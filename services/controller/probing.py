"""The leader's own question to an engine whose agent is silent, whether it is there.

Any HTTP answer to `GET /v1/models` below 500 counts. It proves less than an agent's probe, which
generates a token; it only decides whether silence is the agent's or the engine's.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Mapping
from typing import Final, Protocol
from urllib.parse import urlsplit

from shared.models.deployment import EngineKind
from shared.models.replica import Replica
from shared.secret import Secret, replica_api_key

STATUS_LINE_BYTES: Final = 4096


class Prober(Protocol):
    """Asks engines whether they are there."""

    async def answers(self, replica: Replica) -> bool:
        """Tell whether the engine of `replica` answers in time; never raises."""
        ...


class HttpProber:
    """Asks over HTTP, with the replica's own derived key."""

    def __init__(self, fleet_secret: Secret, environ: Mapping[str, str], deadline_s: float) -> None:
        self._fleet_secret = fleet_secret
        self._environ = environ
        self._deadline_s = deadline_s

    async def answers(self, replica: Replica) -> bool:
        """Tell whether the engine of `replica` answers in time; never raises."""
        try:
            async with asyncio.timeout(self._deadline_s):
                status = await self._status(replica)
        except (OSError, ValueError, TimeoutError):
            return False
        return 200 <= status < 500

    async def _status(self, replica: Replica) -> int:
        parts = urlsplit(replica.url)
        if parts.hostname is None or parts.scheme not in {"http", "https"}:
            return 0
        secure = parts.scheme == "https"
        reader, writer = await asyncio.open_connection(
            parts.hostname,
            parts.port or (443 if secure else 80),
            ssl=ssl.create_default_context() if secure else None,
            limit=STATUS_LINE_BYTES,
        )
        try:
            request = f"GET {parts.path.rstrip('/')}/v1/models HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            key = self._key(replica)
            if key:
                request += f"Authorization: Bearer {key}\r\n"
            writer.write(f"{request}Connection: close\r\n\r\n".encode())
            await writer.drain()
            line = await reader.readline()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        words = line.split(b" ", 2)
        return int(words[1]) if len(words) > 1 and words[0].startswith(b"HTTP/") else 0

    def _key(self, replica: Replica) -> str:
        if replica.kind is EngineKind.EXTERNAL:
            return self._environ.get(replica.api_key_env or "", "")
        return replica_api_key(self._fleet_secret, replica.rid, replica.gen)
