"""Links: what a cut does to connections, whom it spares, and how a drill tells them."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from services.cli import links, linkwish
from services.cli.link import Cut, Link
from services.cli.redisserver import free_port
from services.cli.statedir import StateDir
from shared.errors import InvalidInputError
from tests.support.waiting import wait_until

HOST = "127.0.0.1"


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes."""
    with contextlib.closing(writer), contextlib.suppress(OSError):
        while data := await reader.read(100):
            writer.write(data)
            await writer.drain()


@contextlib.asynccontextmanager
async def linked() -> AsyncGenerator[Link]:
    """Run an echo server behind a link."""
    async with await asyncio.start_server(echo, HOST, 0) as server:
        link = Link(HOST, free_port(), (HOST, server.sockets[0].getsockname()[1]))
        serving = asyncio.create_task(link.serve())
        try:
            await wait_until(lambda: answers(link), what="the link listens")
            yield link
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


async def answers(link: Link) -> bool:
    """Tell whether a new connection gets an echo at once."""
    try:
        async with asyncio.timeout(0.5):
            client = await Client.connect(link)
    except OSError:
        return False
    try:
        return await client.echoed()
    finally:
        client.close()


class Client:
    """One connection through a link."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, link: Link) -> "Client":
        """Connect."""
        host, _, port = link.name.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def echoed(self) -> bool:
        """Send a byte and tell whether it comes back soon."""
        self._writer.write(b"x")
        return await self.heard()

    async def heard(self) -> bool:
        """Tell whether a byte comes soon."""
        with contextlib.suppress(OSError):  # a TimeoutError is one
            async with asyncio.timeout(0.5):
                return await self._reader.read(1) == b"x"
        return False

    def close(self) -> None:
        """Close."""
        self._writer.close()


async def test_a_cut_link_is_silent_and_nothing_is_lost_when_it_opens() -> None:
    """A cut connection neither ends nor passes anything; what was sent arrives afterwards."""
    async with linked() as link:
        client = await Client.connect(link)
        assert await client.echoed()
        link.cut(Cut(link=link.name))
        assert not await client.echoed()
        assert not await answers(link)
        link.cut(None)
        assert await client.heard()
        assert await answers(link)
        client.close()


async def test_a_cut_can_be_limited_to_the_connections_of_some_processes() -> None:
    """Connections of other processes go on, old ones and new ones."""
    async with linked() as link:
        client = await Client.connect(link)
        assert await client.echoed()
        link.cut(Cut(link=link.name, pids=(1,)))
        assert await client.echoed()
        assert await answers(link)
        link.cut(Cut(link=link.name, pids=(os.getpid(),)))
        assert not await client.echoed()
        assert not await answers(link)
        client.close()


async def test_new_connections_go_to_a_new_target_and_old_ones_stay() -> None:
    """A link whose target dies resets; a new target is used from the next connection on."""
    async with linked() as link:
        client = await Client.connect(link)
        before = link.target
        link.target = (HOST, free_port())
        assert not await answers(link)
        assert await client.echoed()
        link.target = before
        assert await answers(link)
        client.close()


def test_the_command_line_names_every_link() -> None:
    """The first link leads to Redis; each engine port has one from its agent's address."""
    made = links.parse("7000:7001", ("127.0.0.2:18000-18002", "127.0.0.3:18100-18100"))
    assert [(link.name, link.target) for link in made] == [
        ("127.0.0.1:7000", (HOST, 7001)),
        ("127.0.0.2:18000", (HOST, 18000)),
        ("127.0.0.2:18001", (HOST, 18001)),
        ("127.0.0.2:18002", (HOST, 18002)),
        ("127.0.0.3:18100", (HOST, 18100)),
    ]
    with pytest.raises(InvalidInputError):
        links.parse("7000", ())


async def test_a_wish_that_nobody_reads_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drill that cannot reach the links says so instead of striking nothing."""
    monkeypatch.setattr(linkwish, "SEEN_DEADLINE_S", 0.1)
    with pytest.raises(Exception, match="do not answer"):
        await linkwish.tell(StateDir(tmp_path), cuts=(), redis=None)


async def test_links_follow_the_wish_until_it_expires(tmp_path: Path) -> None:
    """A cut is made when it is wished, and ends by itself although nobody takes it back."""
    state = StateDir(tmp_path)
    async with await asyncio.start_server(echo, HOST, 0) as server:
        port = server.sockets[0].getsockname()[1]
        link = Link(HOST, free_port(), (HOST, port))
        running = asyncio.create_task(links.Links(state, [link]).run())
        try:
            await wait_until(lambda: answers(link), what="the link listens")
            await linkwish.tell(state, cuts=(Cut(link=link.name),), redis=None, hold_s=1.5)
            assert not await answers(link)
            await wait_until(lambda: answers(link), what="the cut is over")
            assert linkwish.read(state).cuts
            await linkwish.tell(state, cuts=(), redis=(HOST, free_port()))
            assert not await answers(link)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
