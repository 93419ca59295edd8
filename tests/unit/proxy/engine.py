"""A replica for tests: an HTTP/1.1 server whose answers each test scripts, byte by byte."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any, Self


class Exchanged:
    """One request as the replica saw it, and the means to answer it."""

    def __init__(
        self,
        engine: "Engine",
        head: bytes,
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        line, *rest = head.decode("latin-1").split("\r\n")
        self.engine = engine
        self.method, self.path, _ = line.split(" ")
        self.headers = {
            name.lower(): value for name, _, value in (field.partition(": ") for field in rest)
        }
        self.body = body
        self._reader = reader
        self.writer = writer

    @property
    def json(self) -> dict[str, Any]:
        """The body, decoded."""
        return json.loads(self.body)

    async def head(self, status: int, content_type: str, *framing: str) -> None:
        """Write the head of an answer."""
        fields = [f"HTTP/1.1 {status} X", f"content-type: {content_type}", *framing]
        self.writer.write(("\r\n".join(fields) + "\r\n\r\n").encode())
        await self.writer.drain()

    async def whole(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        """Write a whole answer."""
        await self.head(status, content_type, f"content-length: {len(body)}")
        self.writer.write(body)
        await self.writer.drain()

    async def begin_stream(self) -> None:
        """Write the head of a chunked event stream."""
        await self.head(200, "text/event-stream; charset=utf-8", "transfer-encoding: chunked")

    async def chunk(self, data: bytes) -> None:
        """Write one chunk; an empty one ends the answer."""
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await self.writer.drain()

    async def event(self, payload: object) -> None:
        """Write one server-sent event."""
        text = payload if isinstance(payload, str) else json.dumps(payload, ensure_ascii=False)
        await self.chunk(f"data: {text}\n\n".encode())

    async def text(self, text: str, finish: str | None = None) -> None:
        """Write one chat chunk that carries `text`."""
        await self.event({"choices": [{"delta": {"content": text}, "finish_reason": finish}]})

    async def end_stream(self) -> None:
        """End a stream as an engine does."""
        await self.event("[DONE]")
        await self.chunk(b"")

    async def abandoned(self) -> None:
        """Wait until the proxy closes the connection, and count it."""
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(65536):
                pass
        self.engine.aborted += 1

    def reset(self) -> None:
        """Drop the connection without a word."""
        self.writer.transport.abort()


Behaviour = Callable[[Exchanged], Awaitable[None]]


async def hello(exchanged: Exchanged) -> None:
    """Answer as a small engine: a stream of two words, or one JSON document."""
    if exchanged.json.get("stream"):
        await exchanged.begin_stream()
        await exchanged.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await exchanged.text("Hello")
        await exchanged.text(" there", "stop")
        await exchanged.end_stream()
    else:
        answer = {"object": "chat.completion", "usage": {"completion_tokens": 2}}
        await exchanged.whole(200, json.dumps(answer).encode())


class Engine:
    """A scripted replica. Use as an async context manager."""

    def __init__(self, behave: Behaviour = hello) -> None:
        self.behave = behave
        self.seen: list[Exchanged] = []
        self.aborted = 0
        self.connections = 0
        self.url = ""
        self._server: asyncio.Server | None = None
        self._port: int = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def start(self) -> None:
        """Listen; on the same port as before, if it listened before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def __aexit__(self, *_exc: object) -> None:
        await self.kill()

    async def kill(self) -> None:
        """Die: the port closes, and every connection is reset."""
        if self._server is not None:
            self._server.close()
        self.drop_connections()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None

    def drop_connections(self) -> None:
        """Reset every connection, and go on listening."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
                length = 0
                for line in head.split(b"\r\n"):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                exchanged = Exchanged(self, head, await reader.readexactly(length), reader, writer)
                self.seen.append(exchanged)
                await self.behave(exchanged)
                if writer.is_closing():
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
