"""The part of Redis that the scripts use, in memory: data, expiry by a clock, nothing else.

It exists for speed: a script on it takes some 30 µs, so that thousands of histories can be tried in
a minute. `test_store.py` holds it against a real server.
"""

import copy
from collections.abc import Callable
from typing import Any, Final

Reply = str | int | bool | tuple[Any, ...]
"""As Lua sees it: False is nil, a tuple is an array."""


class Store:
    """The data of one server."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.expires_ms: dict[str, float] = {}
        self.now_ms: Callable[[], float] = lambda: 0.0
        self.publish: Callable[[str, str], None] = lambda _channel, _message: None

    def copied(self) -> "Store":
        """Copy the data, as a replica that stops following has it."""
        other = Store()
        other.data = copy.deepcopy(self.data)
        other.expires_ms = dict(self.expires_ms)
        return other

    def expire(self) -> None:
        """Drop what has expired."""
        if self.expires_ms:
            now_ms = self.now_ms()
            for key in [key for key, at in self.expires_ms.items() if at <= now_ms]:
                self.delete(key)

    def delete(self, key: str) -> int:
        """Remove a key."""
        self.expires_ms.pop(key, None)
        return int(self.data.pop(key, None) is not None)

    def hash(self, key: str) -> dict[str, str]:
        """Give a hash to read."""
        return self.data.get(key) or {}

    def zset(self, key: str) -> dict[str, float]:
        """Give a sorted set to read, unsorted."""
        return self.data.get(key) or {}

    def text(self, key: str) -> str | None:
        """Give a string."""
        return self.data.get(key)

    def call(self, name: str, *args: Any) -> Reply:  # noqa: ANN401 - Lua passes text and numbers
        """Run one command."""
        return COMMANDS[name](self, *args)

    def discard(self, key: str, fields: tuple[str, ...]) -> int:
        """Remove fields of a hash or members of a sorted set, and the key with its last."""
        held = self.data.get(key)
        if not held:
            return 0
        removed = sum(held.pop(field, None) is not None for field in fields)
        if not held:
            self.delete(key)
        return removed

    def ranked(self, key: str) -> list[tuple[str, float]]:
        """Give a sorted set in order."""
        return sorted(self.zset(key).items(), key=lambda item: (item[1], item[0]))


def digits(score: float) -> str:
    """Write a score as Redis does."""
    return str(int(score)) if score == int(score) and abs(score) < 1e17 else f"{score:.17g}"


def _bound(text: str) -> tuple[float, bool]:
    return (float(text[1:]), True) if text.startswith("(") else (float(text), False)


def _within(score: float, low: str, high: str) -> bool:
    (lowest, above), (highest, below) = _bound(low), _bound(high)
    return (score > lowest if above else score >= lowest) and (
        score < highest if below else score <= highest
    )


def _flat(pairs: list[tuple[str, float]]) -> tuple[str, ...]:
    return tuple(part for name, score in pairs for part in (name, digits(score)))


def _hset(store: Store, key: str, *pairs: str) -> int:
    held = store.data.setdefault(key, {})
    before = len(held)
    for field, value in zip(pairs[::2], pairs[1::2], strict=True):
        held[str(field)] = str(value)
    return len(held) - before


def _hgetall(store: Store, key: str) -> tuple[str, ...]:
    return tuple(part for pair in store.hash(key).items() for part in pair)


def _zadd(store: Store, key: str, *args: str) -> int:
    options = [arg for arg in args[:1] if arg in {"NX", "XX"}]
    pairs = args[len(options) :]
    added = 0
    for score, member in zip(pairs[::2], pairs[1::2], strict=True):
        held = store.zset(key)
        if ("XX" in options and member not in held) or ("NX" in options and member in held):
            continue
        added += member not in held
        store.data.setdefault(key, {})[member] = float(score)
    return added


def _zscore(store: Store, key: str, member: str) -> str | bool:
    score = store.zset(key).get(member)
    return False if score is None else digits(score)


def _zmscore(store: Store, key: str, *members: str) -> tuple[str | bool, ...]:
    return tuple(_zscore(store, key, member) for member in members)


def _zrange(store: Store, key: str, first: str, last: str, *options: str) -> tuple[str, ...]:
    ranked = store.ranked(key)
    low, high = int(first), int(last)
    part = ranked[low : len(ranked) if high == -1 else high + 1]
    return _flat(part) if options else tuple(name for name, _ in part)


def _zrangebyscore(store: Store, key: str, low: str, high: str, *limit: str) -> tuple[str, ...]:
    found = [name for name, score in store.ranked(key) if _within(score, low, high)]
    return tuple(found[: int(limit[2])] if limit else found)


def _zcount(store: Store, key: str, low: str, high: str) -> int:
    return sum(_within(score, low, high) for score in store.zset(key).values())


def _zcard(store: Store, key: str) -> int:
    return len(store.zset(key))


def _object(store: Store, what: str, key: str) -> str | bool:
    """Tell a key's encoding: one that needs no remedy."""
    del what
    return "hashtable" if key in store.data else False


def _set(store: Store, key: str, value: object, *options: str) -> str | bool:
    if "NX" in options and key in store.data:
        return False
    store.data[key] = str(value)
    store.expires_ms.pop(key, None)
    return "OK"


def _pexpire(store: Store, key: str, ms: str) -> int:
    if key not in store.data:
        return 0
    store.expires_ms[key] = store.now_ms() + float(ms)
    return 1


def _pttl(store: Store, key: str) -> int:
    if key not in store.data:
        return -2
    at = store.expires_ms.get(key)
    return -1 if at is None else int(at - store.now_ms())


def _time(store: Store) -> tuple[str, str]:
    micros = int(store.now_ms() * 1000)
    return str(micros // 1_000_000), str(micros % 1_000_000)


def _publish(store: Store, channel: str, message: str) -> int:
    store.publish(channel, message)
    return 0


def _xadd(store: Store, key: str, *args: object) -> str:
    stream: list[tuple[str, ...]] = store.data.setdefault(key, [])
    stream.append(tuple(str(arg) for arg in args))
    return f"{int(store.now_ms())}-{len(stream)}"


def _del(store: Store, *keys: str) -> int:
    return sum(store.delete(key) for key in keys)


def _get(store: Store, key: str) -> str | bool:
    text = store.text(key)
    return False if text is None else text


def _remove(store: Store, key: str, *names: str) -> int:
    return store.discard(key, names)


def _hget(store: Store, key: str, field: str) -> str | bool:
    return store.hash(key).get(field, False)


def _hlen(store: Store, key: str) -> int:
    return len(store.hash(key))


def _hmget(store: Store, key: str, *fields: str) -> tuple[str | bool, ...]:
    return tuple(store.hash(key).get(field, False) for field in fields)


def _hvals(store: Store, key: str) -> tuple[str, ...]:
    return tuple(store.hash(key).values())


COMMANDS: Final[dict[str, Callable[..., Reply]]] = {
    "DEL": _del,
    "GET": _get,
    "HDEL": _remove,
    "HGET": _hget,
    "HGETALL": _hgetall,
    "HLEN": _hlen,
    "HMGET": _hmget,
    "HSET": _hset,
    "HVALS": _hvals,
    "OBJECT": _object,
    "PEXPIRE": _pexpire,
    "PTTL": _pttl,
    "PUBLISH": _publish,
    "SET": _set,
    "TIME": _time,
    "XADD": _xadd,
    "ZADD": _zadd,
    "ZCARD": _zcard,
    "ZCOUNT": _zcount,
    "ZMSCORE": _zmscore,
    "ZRANGE": _zrange,
    "ZRANGEBYSCORE": _zrangebyscore,
    "ZREM": _remove,
    "ZSCORE": _zscore,
}
