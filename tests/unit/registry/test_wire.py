"""The data plane's own client: every command gets exactly one answer, its own, whatever happens."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
import redis.exceptions

from shared.registry import wire as module
from shared.registry.clients import make_client
from shared.registry.wire import WireClient, head_of
from tests.support.scripted import CUT, SILENT, Last, ScriptedServer
from tests.support.servers import RedisServer, Servers, free_port
from tests.support.waiting import wait_until

Make = Callable[[str], WireClient]


@pytest.fixture(autouse=True)
def nothing_blocks(unblocked: None) -> None:
    """Every test here also proves that the client never blocks the loop."""


@pytest.fixture
async def make() -> AsyncGenerator[Make]:
    """Make clients, closed at the end."""
    made: list[WireClient] = []

    def client(url: str) -> WireClient:
        found = make_client(url, hot=True)
        assert isinstance(found, WireClient)
        made.append(found)
        return found

    yield client
    for one in made:
        await one.aclose()


class Answers:
    """What came back, by number of the command."""

    def __init__(self) -> None:
        self.by_number: dict[int, list[Any]] = {}
        self.asked = 0

    def ask(self, client: WireClient) -> int:
        """Ask the server to say a number that nobody else asks for."""
        number = self.asked
        self.asked += 1
        client.submit(("ECHO", number), self.by_number.setdefault(number, []).append)
        return number

    def complete(self) -> bool:
        """Tell whether each command has an answer."""
        return all(self.by_number.values())

    def check(self) -> tuple[int, int]:
        """Check that each has one answer, its own; count replies and errors."""
        replies = errors = 0
        for number, answers in self.by_number.items():
            assert len(answers) == 1, f"{number} was answered {len(answers)} times"
            if isinstance(answers[0], Exception):
                errors += 1
            else:
                assert answers[0] == b"%d" % number
                replies += 1
        return replies, errors


def echo(command: list[bytes]) -> bytes:
    """Answer as Redis answers ECHO."""
    return b"$%d\r\n%s\r\n" % (len(command[1]), command[1])


def pong(command: list[bytes]) -> bytes:
    """Answer as Redis answers PING."""
    return b"+PONG\r\n"


async def test_replies_meet_their_commands(redis_server: RedisServer, make: Make) -> None:
    """Commands of many turns of the loop travel at once, and each gets its own reply."""
    client, answers = make(redis_server.url), Answers()
    for _ in range(20):
        for _ in range(50):
            answers.ask(client)
        await asyncio.sleep(0)
    await wait_until(answers.complete)
    assert answers.check() == (1000, 0)


async def test_a_beginning_is_encoded_once(redis_server: RedisServer, make: Make) -> None:
    """A command of a prepared beginning and a rest is the same as the whole."""
    client = make(redis_server.url)
    replies: list[Any] = []
    client.submit(("é", 7, b"\x00\xff"), replies.append, head_of("EVAL", "return ARGV", 0))
    await wait_until(lambda: replies)
    assert replies == [["é".encode(), b"7", b"\x00\xff"]]


async def test_answers_come_later(redis_server: RedisServer, make: Make) -> None:
    """Nothing is answered within the call that asks, not even a refusal."""
    client = make(redis_server.url)
    replies: list[Any] = []
    for _ in range(module.MAX_UNANSWERED + 1):
        client.submit(("PING",), replies.append)
        assert replies == []
    await wait_until(lambda: len(replies) == module.MAX_UNANSWERED + 1)
    refused = [reply for reply in replies if isinstance(reply, Exception)]
    assert [str(reply) for reply in refused] == ["too many commands are under way"]


async def test_an_error_is_its_own_commands(redis_server: RedisServer, make: Make) -> None:
    """An error reply reaches the one who asked, as a value; the connection goes on."""
    client = make(redis_server.url)
    replies: list[Any] = []
    client.submit(("PING",), replies.append)
    client.submit(("NOSUCH",), replies.append)
    client.submit(("EVALSHA", "0" * 40, 0), replies.append)
    client.submit(("PING",), replies.append)
    await wait_until(lambda: len(replies) == 4)
    assert replies[0] == replies[3] == b"PONG"
    assert isinstance(replies[1], redis.exceptions.ResponseError)
    assert str(replies[1]).startswith("unknown command")
    assert isinstance(replies[2], redis.exceptions.NoScriptError)


async def test_half_a_reply(make: Make) -> None:
    """A connection that ends within a reply answers that command and those behind it with why."""
    acts = iter([b"$5\r\nwhole\r\n", Last(b"$5\r\nha")])
    async with ScriptedServer(lambda _: next(acts)) as server:
        client = make(server.url)
        replies: list[Any] = []
        for _ in range(3):
            client.submit(("GET", "x"), replies.append)
        await wait_until(lambda: len(replies) == 3)
    assert replies[0] == b"whole"
    assert [type(reply) for reply in replies[1:]] == [redis.exceptions.ConnectionError] * 2


async def test_a_reply_in_parts(make: Make) -> None:
    """A reply that comes byte by byte, between others, is put together."""
    whole = b"*2\r\n$2\r\nab\r\n:7\r\n"
    parts = iter([whole[n : n + 1] for n in range(len(whole))])

    def act(command: list[bytes]) -> bytes | str:
        return next(parts, SILENT)

    async with ScriptedServer(act) as server:
        client = make(server.url)
        replies: list[Any] = []
        for _ in whole:
            client.submit(("GET", "x"), replies.append)
        await wait_until(lambda: len(replies) == len(whole))
    assert replies[0] == [b"ab", 7]
    assert {type(reply) for reply in replies[1:]} == {redis.exceptions.TimeoutError}


async def test_silence_ends_the_connection(make: Make) -> None:
    """What is not answered in time fails with all behind it, and the next command connects anew."""
    async with ScriptedServer(lambda _: SILENT) as server:
        client = make(server.url)
        replies: list[Any] = []
        client.submit(("PING",), replies.append)
        client.submit(("PING",), replies.append)
        await wait_until(lambda: len(replies) == 2)
        assert {type(reply) for reply in replies} == {redis.exceptions.TimeoutError}
        await wait_until(lambda: server.open == 0)
        server.act = pong
        assert await client.execute_command("PING") == b"PONG"
        assert server.connections == 2


async def test_a_late_reply_is_nobodys(servers: Servers, make: Make) -> None:
    """The reply to a command that was given up is never taken for another's."""
    server = servers.new()
    client, answers = make(server.url), Answers()
    server.command("CLIENT", "PAUSE", 400, "ALL")
    answers.ask(client)
    await wait_until(answers.complete)
    patient = [client.execute_command("ECHO", n) for n in range(5)]
    replies = await asyncio.gather(*patient)
    assert replies == [b"%d" % n for n in range(5)]
    assert answers.check() == (0, 1)
    server.kill()


async def test_a_stall_of_ours_is_not_silence(make: Make) -> None:
    """When our own loop stands still, replies that have arrived meanwhile still count."""
    async with ScriptedServer(echo) as server:
        client, answers = make(server.url), Answers()
        answers.ask(client)
        await wait_until(answers.complete)
        answers.ask(client)
        wire: Any = vars(client)["_wire"]
        # As if the timer fired before the socket was read, a second late.
        wire._unanswered[0] = (wire._unanswered[0][0], wire._loop.time() - 1.0)
        wire._check(wire._loop.time() - 0.75)
        await wait_until(answers.complete)
        assert answers.check() == (2, 0)
        assert server.connections == 1


async def test_what_is_no_reply_ends_the_connection(make: Make) -> None:
    """A server that speaks something else answers nothing: all fail, and nothing hangs."""
    async with ScriptedServer(lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n") as server:
        client = make(server.url)
        replies: list[Any] = []
        client.submit(("PING",), replies.append)
        await wait_until(lambda: replies)
        assert isinstance(replies[0], redis.exceptions.ConnectionError)
        assert "as Redis does" in str(replies[0])


async def test_a_reply_to_nothing_ends_the_connection(make: Make) -> None:
    """One reply too many would shift all others: the connection ends instead."""
    async with ScriptedServer(lambda _: b"+PONG\r\n+PONG\r\n") as server:
        client = make(server.url)
        assert await client.execute_command("PING") == b"PONG"
        await wait_until(lambda: server.open == 0)


@pytest.mark.parametrize("seed", range(12))
async def test_one_answer_each_under_random_cuts(make: Make, seed: int) -> None:
    """Under cuts, halves, silences and errors each command gets one answer, and never another's."""
    pick = random.Random(seed)
    rare = pick.choice((CUT, "half", "error", SILENT))
    good = pick.choice((1, 5, 30))

    def act(command: list[bytes]) -> bytes | str:
        whole = echo(command)
        kind = rare if pick.randrange(good + 1) == 0 else "echo"
        if kind == "half":
            return Last(whole[: pick.randrange(1, len(whole))])
        return {"echo": whole, "error": b"-ERR of its own\r\n"}.get(kind, kind)

    async with ScriptedServer(act) as server:
        client, answers = make(server.url), Answers()
        for _ in range(60):
            for _ in range(pick.randrange(12)):
                answers.ask(client)
            await asyncio.sleep(pick.choice((0, 0, 0.001, 0.01)))
        await wait_until(answers.complete)
    replies, errors = answers.check()
    assert errors
    assert replies + errors == answers.asked


async def test_refused_at_once_while_away(make: Make) -> None:
    """While nothing listens, commands are refused without a wait, and connecting is no storm."""
    client = make(f"redis://127.0.0.1:{free_port()}/0")
    replies: list[Any] = []
    loop, attempts = asyncio.get_running_loop(), 0
    pool: Any = vars(client)["_library"].connection_pool
    connect = pool.make_connection

    def counted() -> object:
        nonlocal attempts
        attempts += 1
        return connect()

    pool.make_connection = counted
    until_s = loop.time() + 1.0
    asked = 0
    while loop.time() < until_s:
        client.submit(("PING",), replies.append)
        asked += 1
        await asyncio.sleep(0.001)
    await wait_until(lambda: len(replies) == asked)
    assert {type(reply) for reply in replies} == {redis.exceptions.ConnectionError}
    assert 4 <= attempts <= 16


async def test_a_server_that_only_accepts_is_no_storm(make: Make) -> None:
    """A server that takes connections and ends them is asked again after growing pauses only."""
    async with ScriptedServer(lambda _: CUT) as server:
        client = make(server.url)
        replies: list[Any] = []
        loop = asyncio.get_running_loop()
        until_s = loop.time() + 1.0
        while loop.time() < until_s:
            client.submit(("PING",), replies.append)
            await asyncio.sleep(0.001)
        assert 4 <= server.connections <= 16


async def test_a_patient_caller_waits_out_the_pause(make: Make) -> None:
    """Who awaits a command finds Redis as soon as it is back, pause or not."""
    async with ScriptedServer(lambda _: CUT) as server:
        client = make(server.url)
        for _ in range(6):
            with pytest.raises(redis.exceptions.ConnectionError):
                await client.execute_command("PING")
        server.act = pong
        assert await client.execute_command("PING") == b"PONG"


async def test_closing_answers_everything(make: Make) -> None:
    """What is under way when we close, or waits for a connection, is answered with an error."""
    async with ScriptedServer(lambda _: SILENT) as server:
        connected, connecting = make(server.url), make(server.url)
        answers = Answers()
        answers.ask(connected)
        await wait_until(lambda: server.commands)
        answers.ask(connected)
        answers.ask(connecting)
        await connected.aclose()
        await connecting.aclose()
        answers.ask(connected)
        await asyncio.sleep(0)
        assert answers.check() == (0, 4)


async def test_ones_error_is_not_anothers(redis_server: RedisServer, make: Make) -> None:
    """A callback that raises is reported as the loop does it, and the others get their replies."""
    client = make(redis_server.url)
    replies: list[Any] = []
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    def fails(reply: object) -> None:
        raise ValueError(reply)

    client.submit(("PING",), replies.append)
    client.submit(("PING",), fails)
    client.submit(("PING",), replies.append)
    await wait_until(lambda: len(replies) == 2)
    assert [str(context["exception"]) for context in reported] == ["b'PONG'"]


async def test_a_cancelled_caller_loses_nobodys_reply(
    redis_server: RedisServer, make: Make
) -> None:
    """A caller that stops waiting takes no reply from the next."""
    client = make(redis_server.url)
    first = asyncio.ensure_future(client.execute_command("ECHO", "first"))
    await asyncio.sleep(0)
    first.cancel()
    assert await client.execute_command("ECHO", "second") == b"second"
