"""One streamed request to a proxy, over a connection of its own, as a client would make it.

Bytes are collected, counted and timed as they arrive; they are judged once, when the stream has
ended, so that many streams cost little on the machine that also runs the mesh.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Final, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from services.cli.drill.answers import Answer, judge
from services.cli.drill.records import Outcome

CONNECT_S: Final = 3.0
"""A proxy that does not accept a connection within this is not there."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked."""

    model: str
    prompt: str
    tokens: int
    reference: str | None = None
    """The text of an undisturbed run, if the answer is to be compared."""

    def body(self) -> bytes:
        """Write it as a greedy chat request of exactly `tokens` tokens."""
        return msgspec.json.encode(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": self.prompt}],
                "max_tokens": self.tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )


class Stream(asyncio.Protocol):
    """One exchange. `answer` is there when `ask` returns."""

    def __init__(self, heard: Callable[[int], None], clock: Callable[[], float]) -> None:
        self._heard = heard
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._whole = False
        self._last_s = clock()
        self.status = 0
        self.first_s: float | None = None
        """When the first byte of the body came."""
        self.gap_s = 0.0
        """The longest wait for the first or next part."""
        self.gap_ended_s = 0.0

    async def ask(self, url: str, question: Question, timeout_s: float) -> Answer:
        """Ask the proxy at `url`; never raises for what a mesh does."""
        parts = urlsplit(url)
        secure = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if secure else 80)
        loop = asyncio.get_running_loop()
        self._last_s = self._clock()
        try:
            async with asyncio.timeout(CONNECT_S):
                made = await loop.create_connection(
                    lambda: self, parts.hostname or "", port, ssl=secure
                )
        except OSError as error:  # a TimeoutError is one
            return Answer(outcome=Outcome.REFUSED, detail=error.strerror or "no connection")
        transport = made[0]
        try:
            transport.write(_encode(parts.netloc, question.body()))
            async with asyncio.timeout(timeout_s):
                await self._ended
        except TimeoutError:
            self._gap()
            return Answer(outcome=Outcome.TIMEOUT, detail=f"not whole within {timeout_s:g} s")
        finally:
            transport.abort()
        return judge(
            self.status,
            b"".join(self._parts),
            whole=self._whole,
            tokens=question.tokens,
            reference=question.reference,
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Parse what came; what is no HTTP ends the exchange."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the exchange, whole or not."""
        del exc
        self._end()

    def on_headers_complete(self) -> None:
        """Note the status."""
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """Collect, count and time a part of the body."""
        if self.first_s is None:
            self.first_s = self._clock()
        self._gap()
        self._parts.append(data)
        self._heard(data.count(b"data: "))

    def on_message_complete(self) -> None:
        """End the exchange as HTTP says."""
        self._whole = True
        self._end()

    def _gap(self) -> None:
        now_s = self._clock()
        if now_s - self._last_s > self.gap_s:
            self.gap_s, self.gap_ended_s = now_s - self._last_s, now_s
        self._last_s = now_s

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


def _encode(authority: str, body: bytes) -> bytes:
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {authority}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode("latin-1") + body
