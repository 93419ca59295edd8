"""Resumable streams for tests: proxies that share engines and a Redis in memory, and readers."""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator
from typing import Any, Final, NamedTuple

import fakeredis
import httpx

from services.proxy.resume.writing import Writing
from shared.registry.connection import Connection
from shared.registry.keys import Keys
from shared.registry.loader import ScriptLibrary
from shared.registry.streams import Streams
from tests.unit.proxy.rig import Rig

RESUMABLE: Final = {"x-redmesh-resumable": "1"}
NUMBER: Final = re.compile(rb"(?m)^id: (\d+)\n")


class Got(NamedTuple):
    """What a reader has received."""

    stream: str
    body: bytes

    @property
    def numbers(self) -> list[int]:
        """The events' numbers."""
        return [int(number) for number in NUMBER.findall(self.body)]

    @property
    def plain(self) -> bytes:
        """The events without their numbers."""
        return NUMBER.sub(b"", self.body)


def up_to(body: bytes, number: int) -> bytes:
    """Cut a numbered stream after event `number`."""
    return b"".join(event + b"\n\n" for event in body.split(b"\n\n")[:number])


async def ask(
    rig: Rig, path: str, asked: dict[str, Any], *, events: int | None = None, **headers: str
) -> Got:
    """Begin a resumable stream; leave after `events`, or read it to its end."""
    async with rig.http.stream("POST", path, json=asked, headers=RESUMABLE | headers) as answer:
        assert answer.status_code == 200
        return await _receive(answer, events)


async def resume(
    rig: Rig, stream: str, seen: int | None = None, *, events: int | None = None
) -> Got:
    """Resume a stream after event `seen`."""
    headers = {} if seen is None else {"last-event-id": str(seen)}
    async with rig.http.stream("GET", f"/v1/streams/{stream}", headers=headers) as answer:
        assert answer.status_code in {200, 204}, await answer.aread()
        return await _receive(answer, events)


async def _receive(answer: httpx.Response, events: int | None) -> Got:
    stream, body = answer.headers.get("x-redmesh-stream", ""), b""
    async for data in answer.aiter_raw():
        body += data
        if events is not None and body.count(b"\n\n") >= events:
            return Got(stream, up_to(body, events))
    return Got(stream, body)


@contextlib.asynccontextmanager
async def journals() -> AsyncGenerator[Streams]:
    """Give a Redis in memory."""
    library = await asyncio.to_thread(ScriptLibrary.load)
    await asyncio.to_thread(lambda: fakeredis.FakeRedis().set("used", 1))
    connection = Connection(fakeredis.FakeAsyncRedis(), library, shown_url="fake")
    yield Streams(connection, Keys())
    await connection.aclose()


def written(rig: Rig) -> list[Writing]:
    """Give what this proxy writes."""
    return list(rig.room._writings.values())  # pyright: ignore[reportPrivateUsage] - looks inside


async def die(rig: Rig) -> None:
    """End everything that writes journals, as if the process had been killed."""
    tasks = list(rig.room._tasks)  # pyright: ignore[reportPrivateUsage] - looks inside
    writings = written(rig)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for writing in writings:
        writing._stop()  # pyright: ignore[reportPrivateUsage] - without a last flush
