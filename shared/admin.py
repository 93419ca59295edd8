"""The admin port of a service: health, metrics and live tables, on loopback unless told otherwise.

A tiny HTTP/1.1 server for GET requests from probes, Prometheus and the command line. It answers
from memory, closes every connection after one answer, and limits the size and the time of a
request, so that nothing a stranger sends can hold it up. It is not the data plane.
"""

import asyncio
import contextlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Final, Self

import msgspec
import prometheus_client

REQUEST_LIMIT_BYTES: Final = 8192
REQUEST_DEADLINE_S: Final = 5.0
ANSWER_DEADLINE_S: Final = 10.0


class Answer(msgspec.Struct, frozen=True):
    """What a route returns."""

    body: bytes
    status: int = 200
    content_type: str = "application/json"


Route = Callable[[], Answer | Awaitable[Answer]]
Readiness = Callable[[], str | Awaitable[str | None] | None]
"""Returns None, or the reason why the service is not ready."""


def json_answer(content: object, status: int = 200) -> Answer:
    """Answer with `content` as JSON."""
    return Answer(msgspec.json.encode(content), status)


def health_routes(ready: Readiness) -> dict[str, Route]:
    """Give the health routes."""

    def live() -> Answer:
        return json_answer({"status": "live"})

    async def readiness() -> Answer:
        reason = ready()
        if inspect.isawaitable(reason):
            reason = await reason
        if reason is None:
            return json_answer({"status": "ready"})
        return json_answer({"status": "not ready", "reason": reason}, 503)

    return {"/health/live": live, "/health/ready": readiness}


def metrics_route(registry: prometheus_client.CollectorRegistry) -> dict[str, Route]:
    """Give the `/metrics` route for `registry` in Prometheus' text format."""

    def metrics() -> Answer:
        return Answer(
            prometheus_client.generate_latest(registry),
            content_type=prometheus_client.CONTENT_TYPE_LATEST,
        )

    return {"/metrics": metrics}


class AdminServer:
    """Serves `routes` (exact paths) on `host`:`port`. Use as an async context manager.

    Port 0 takes any free port; `url` tells which, once entered. A port that is taken raises
    OSError from `__aenter__`.
    """

    def __init__(self, host: str, port: int, routes: Mapping[str, Route]) -> None:
        self._host = host
        self._port = port
        self._routes = routes
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """Base URL of this server."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._serve, self._host, self._port, limit=REQUEST_LIMIT_BYTES
        )
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_DEADLINE_S):
                head = await reader.readuntil(b"\r\n\r\n")
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                answer = await self._answer(head)
            async with asyncio.timeout(ANSWER_DEADLINE_S):
                writer.write(_encode(answer))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # a probe that went away, or a stranger: nobody is left to answer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, head: bytes) -> Answer:
        parts = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(parts) != 3:
            return _error(HTTPStatus.BAD_REQUEST, "the request line is malformed")
        method, target, _version = parts
        if method not in {"GET", "HEAD"}:
            return _error(HTTPStatus.METHOD_NOT_ALLOWED, f"use GET, not {method[:16]}")
        route = self._routes.get(target.split("?", 1)[0])
        if route is None:
            known = ", ".join(sorted(self._routes))
            return _error(HTTPStatus.NOT_FOUND, f"no such page; there are: {known}")
        answer = route()
        if inspect.isawaitable(answer):
            answer = await answer
        return msgspec.structs.replace(answer, body=b"") if method == "HEAD" else answer


def _error(status: HTTPStatus, message: str) -> Answer:
    return json_answer({"error": message}, int(status))


def _encode(answer: Answer) -> bytes:
    phrase = HTTPStatus(answer.status).phrase
    head = (
        f"HTTP/1.1 {answer.status} {phrase}\r\n"
        f"content-type: {answer.content_type}\r\n"
        f"content-length: {len(answer.body)}\r\n"
        "cache-control: no-store\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode("latin-1") + answer.body


async def fetch(url: str, *, deadline_s: float = 2.0) -> bytes:
    """GET a page from another service's admin port and return its body.

    Raises OSError when there is no answer in time, ValueError when the answer is not 200.
    """
    scheme, _, rest = url.partition("://")
    authority, _, path = rest.partition("/")
    host, _, port = authority.rpartition(":")
    if scheme != "http" or not port.isdigit():
        message = f"not an admin URL: {url!r}"
        raise ValueError(message)
    async with asyncio.timeout(deadline_s):
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        try:
            writer.write(f"GET /{path} HTTP/1.1\r\nhost: {authority}\r\n\r\n".encode())
            await writer.drain()
            raw = await reader.read()
        finally:
            writer.close()
    head, _, body = raw.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        message = f"{url} answered {head[:60].decode('latin-1')!r}"
        raise ValueError(message)
    return body
