"""A minimal HTTP/1.1 client for probes: one request, one connection, one deadline, a size limit.

Probes must not wait for a connection pool, nor hide a retry: what they see is what happened. The
data plane has its own client.
"""

import asyncio
import ssl
from typing import Final
from urllib.parse import SplitResult, urlsplit

import msgspec

BODY_LIMIT_BYTES: Final = 8 << 20
HEAD_LIMIT_BYTES: Final = 64 << 10


class Response(msgspec.Struct, frozen=True):
    """What a server answered."""

    status: int
    body: bytes


async def request(
    url: str,
    *,
    deadline_s: float,
    api_key: str = "",
    content: object = None,
) -> Response:
    """GET `url`, or POST `content` to it as JSON.

    Raises OSError when there is no complete, well-formed answer within `deadline_s` seconds
    (TimeoutError is one).
    """
    try:
        async with asyncio.timeout(deadline_s):
            return await _exchange(urlsplit(url), api_key, content)
    except (ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        # An address that is none (a port of 99999) is a ValueError as well.
        message = f"{url} gave no well-formed answer: {error}"
        raise ConnectionError(message) from error


async def _exchange(parts: SplitResult, api_key: str, content: object) -> Response:
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if secure else 80)
    reader, writer = await asyncio.open_connection(
        parts.hostname, port, ssl=secure, limit=HEAD_LIMIT_BYTES
    )
    try:
        writer.write(_encode(parts, api_key, content))
        await writer.drain()
        return await _read(reader)
    finally:
        writer.transport.abort()


def _encode(parts: SplitResult, api_key: str, content: object) -> bytes:
    body = b"" if content is None else msgspec.json.encode(content)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [
        f"{'GET' if content is None else 'POST'} {path} HTTP/1.1",
        f"host: {parts.netloc.rpartition('@')[2]}",
        "connection: close",
        "accept-encoding: identity",
    ]
    if api_key:
        lines.append(f"authorization: Bearer {api_key}")
    if content is not None:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


async def _read(reader: asyncio.StreamReader) -> Response:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    status = int(first.split(" ", 2)[1])
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
    }
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return Response(status, await _read_chunks(reader))
    length = headers.get("content-length")
    if length is not None:
        _limit(int(length))
        return Response(status, await reader.readexactly(int(length)))
    body = await reader.read(BODY_LIMIT_BYTES + 1)
    while not reader.at_eof():
        _limit(len(body))
        body += await reader.read(BODY_LIMIT_BYTES + 1)
    return Response(status, body)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while True:
        size = int((await reader.readuntil(b"\r\n")).split(b";", 1)[0], 16)
        if size == 0:
            return bytes(body)
        _limit(len(body) + size)
        body += await reader.readexactly(size)
        await reader.readexactly(2)


def _limit(size_bytes: int) -> None:
    if size_bytes > BODY_LIMIT_BYTES:
        message = f"the answer is larger than {BODY_LIMIT_BYTES} bytes"
        raise ValueError(message)
