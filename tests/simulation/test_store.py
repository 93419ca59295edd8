"""The simulated Redis answers as a real one does, command by command."""

import random
from typing import Any, cast

from tests.simulation.store import Store
from tests.support.servers import RedisServer

HASH, ZSET, TEXT = "{t}h", "{t}z", "{t}s"
NAMES = ("a", "b", "c", "d")
SCORES = ("0", "1", "1", "250", "4000000000000000", "4000000000000007")
BOUNDS = ("-inf", "+inf", "1", "(1", "(250", "4000000000000000")


def command(pick: random.Random) -> tuple[str, ...]:
    """Make one command as the scripts use it."""
    name, score, low, high = (
        pick.choice(NAMES),
        pick.choice(SCORES),
        pick.choice(BOUNDS),
        pick.choice(BOUNDS),
    )
    return pick.choice(
        (
            ("HSET", HASH, name, score, pick.choice(NAMES), "x"),
            ("HGET", HASH, name),
            ("HMGET", HASH, name, "none"),
            ("HDEL", HASH, name),
            ("HDEL", HASH, ""),
            ("HLEN", HASH),
            ("ZADD", ZSET, score, name),
            ("ZADD", ZSET, "XX", score, name),
            ("ZADD", ZSET, "NX", score, name),
            ("ZREM", ZSET, name),
            ("ZREM", ZSET, ""),
            ("ZSCORE", ZSET, name),
            ("ZCOUNT", ZSET, low, high),
            ("ZRANGE", ZSET, "0", str(pick.randrange(-1, 4)), "WITHSCORES"),
            ("ZRANGE", ZSET, str(pick.randrange(4)), "3"),
            ("ZRANGEBYSCORE", ZSET, low, high, "LIMIT", "0", "2"),
            ("SET", TEXT, score),
            ("SET", TEXT, name, "NX"),
            ("GET", TEXT),
            ("PEXPIRE", TEXT, "100000"),
            ("PTTL", HASH),
            ("DEL", pick.choice((HASH, ZSET, TEXT))),
        )
    )


def plain(reply: Any) -> Any:  # noqa: ANN401 - any reply
    """Write a real reply as Lua sees it."""
    if isinstance(reply, (list, tuple)):
        return tuple(plain(part) for part in reply)  # pyright: ignore[reportUnknownVariableType] - nested
    if isinstance(reply, bytes):
        return reply.decode()
    return False if reply is None else reply


def test_the_store_answers_as_redis_does(redis_server: RedisServer) -> None:
    """Thousands of random commands get the same answers here and there."""
    pick, store = random.Random(5), Store()
    with redis_server.client() as client:
        ask = cast("Any", client).execute_command
        ask("DEL", HASH, ZSET, TEXT)
        for number in range(4000):
            parts = command(pick)
            real = plain(ask(*parts))
            assert store.call(*parts) == real, (number, parts)
        ask("DEL", HASH, ZSET, TEXT)
