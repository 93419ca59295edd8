"""What a hostile client sends never becomes a key in Redis, an error in a script, or a crash.

A real proxy and a real Redis, before a replica that answers whatever it is asked.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import pytest

from shared.registry import Registry, open_registry
from shared.registry.keys import Keys
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.servers import RedisServer, any_binary
from tests.support.standalone import ProxyProcess, declare, proxy
from tests.support.waiting import wait_until
from tests.unit.proxy.engine import Engine

pytestmark = pytest.mark.mesh

MODEL: Final = "sim"
CHAT: Final = "/v1/chat/completions"
JSON: Final = {"content-type": "application/json"}
SAID: Final[Mapping[str, Any]] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi"}],
}
HUGE: Final = "x" * 10_000_000
MODELS: Final = (
    "a}:{b",
    "sim}:replicas",
    "{ctl}:leader",
    "redmesh:{ctl}:leader",
    "sim\r\nDEL x",
    "*",
    "\x00",
    "\ud83d",
    "../sim",
    HUGE,
)
COSTS: Final = (
    *("NaN", "Infinity", "-Infinity", "1e308", "-5", "0", "9" * 40, "1.5", '"5"', "[]"),
    "9" * 1_000_000,
)
IDS: Final = ("a}:{b", "x" * 7000, "%00%0d%0a", "*", "' or 1=1")
HEADS: Final = {
    "request id": b"x-request-id: %b",
    "caller": b"authorization: Bearer %b",
    "header": b"%b: x",
}
BODIES: Final = {
    "user": {"user": HUGE},
    "prompt": {"messages": [{"role": "user", "content": HUGE}]},
}
STRANGERS: Final = 10_000
LINES: Final = 16
MILLION: Final = 1_000_000
REFUSED_S: Final = 2.0
"""A request of ten megabytes is answered within this."""
GROWTH_MIB: Final = 64
"""What a proxy may keep of it all: some bodies of ten megabytes pass through it."""
ANSWERED_S: Final = 1.0
"""What the slowest request may take while Redis is slowed down by a million members."""
FILL: Final = (
    "for i = ARGV[1], ARGV[2] do redis.call('ZADD', KEYS[1], 0, 'stranger-' .. i) end return 1"
)


class Scene:
    """A proxy, its Redis, and a client."""

    def __init__(
        self, server: RedisServer, registry: Registry, one: ProxyProcess, http: httpx.AsyncClient
    ) -> None:
        self.server = server
        self.registry = registry
        self.proxy = one
        self.http = http

    @property
    def memory_mib(self) -> int:
        """What the proxy occupies."""
        return psutil.Process(self.proxy.pid).memory_info().rss >> 20

    async def keys(self) -> set[bytes]:
        """Name every key there is."""
        return set(await asyncio.to_thread(self.server.command, "KEYS", "*"))

    async def ask(self, more: Mapping[str, Any], **headers: str) -> httpx.Response:
        """Ask, with something else or something more than is usual."""
        body = json.dumps({**SAID, **more})
        return await self.http.post(CHAT, content=body, headers={**JSON, **headers})

    async def raw(self, head: bytes, body: bytes) -> bytes:
        """Send a request whatever it is; give the status line of the answer.

        The proxy need not read to the end what it refuses.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy.port)
        try:
            writer.write(
                head
                + b"\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                % len(body)
                + body
            )
            async with asyncio.timeout(REFUSED_S):
                return await reader.readline()
        finally:
            writer.transport.abort()

    async def given_back(self) -> bool:
        """Tell whether no reservation is left."""
        totals = await self.registry.ledger.totals(MODEL)
        return all(total.requests == 0 for total in totals.values())


@contextlib.asynccontextmanager
async def scene(folder: Path) -> AsyncGenerator[Scene]:
    """Run all of it; afterwards no reservation may be left, and no error in the proxy's log."""
    server = RedisServer(any_binary(), folder / "redis")
    registry = await open_registry(CommonSettings(redis_url=Secret(server.url)))
    log = folder / "proxy.log"
    try:
        async with Engine() as engine:
            await declare(registry, MODEL, [engine.url])
            async with (
                proxy(server.url, log=str(log)) as one,
                httpx.AsyncClient(base_url=one.url, timeout=20) as http,
            ):
                await wait_until(lambda: one.serves(MODEL), timeout_s=60, what="it serves")
                made = Scene(server, registry, one, http)
                assert (await made.ask({})).status_code == 200
                yield made
                await wait_until(made.given_back, what="no reservation is left")
                assert await one.ready()
        told = log.read_text()
        assert "user_script" not in told, told[-2000:]
        assert "Traceback" not in told, told[-2000:]
        assert len(told) < 1_000_000, "what a client sends fills the log"
    finally:
        await registry.aclose()
        server.kill()


async def test_nothing_a_client_names_becomes_a_key(tmp_path: Path) -> None:
    """Models, ids, costs and callers of every kind and size: Redis holds no more, nor a proxy."""
    async with scene(tmp_path) as at:
        before, memory_mib = await at.keys(), at.memory_mib
        for name in MODELS:
            answer = await at.ask({"model": name})
            assert answer.status_code in {400, 404}, (name[:40], answer.text)
            assert answer.json()["error"]["message"]
            assert len(answer.content) < 1000, "the answer repeats what was asked"
        answer = await at.http.post("/v1/chat/a%7D:%7Bb", json={"messages": SAID["messages"]})
        assert answer.status_code in {400, 404}, answer.text
        asked: dict[str, int] = {}
        for cost in COSTS:
            body = f'{{"model":"{MODEL}","messages":[],"max_tokens":{cost}}}'
            answer = await at.http.post(CHAT, content=body, headers=JSON)
            assert answer.status_code < 500, (cost[:40], answer.text)
            asked[cost[:40]] = answer.status_code
        for request_id in IDS:
            answer = await at.ask({}, **{"x-request-id": request_id})
            assert answer.status_code < 500, (request_id[:40], answer.text)
        await huge(at)
        await strangers(at)
        await wait_until(at.given_back, what="no reservation is left")
        after, grown_mib = await at.keys(), at.memory_mib - memory_mib
        assert after - before == set(), "a client made keys"
        assert grown_mib < GROWTH_MIB
        print(  # noqa: T201 - figures for the reader
            f"\n{len(before)} keys before, {len(after)} after; {grown_mib} MiB more; {asked}"
        )


async def huge(at: Scene) -> None:
    """Send ten megabytes in every part of a request: refused, or served, and soon."""
    body, took_s = json.dumps(SAID).encode(), 0.0
    for part, form in HEADS.items():
        began_s = time.monotonic()
        line = await at.raw(b"POST /v1/chat/completions HTTP/1.1\r\n" + form % HUGE.encode(), body)
        took_s = max(took_s, time.monotonic() - began_s)
        assert line.split()[1] == b"431", (part, line)
    line = await at.raw(b"POST /v1/%b HTTP/1.1" % HUGE.encode(), body)
    assert line.split()[1] == b"431", line
    line = await at.raw(b"POST /v1/chat/completions HTTP/1.1", b"x" * 40_000_000)
    assert line.split()[1] == b"413", line
    for part, more in BODIES.items():
        began_s = time.monotonic()
        answer = await at.ask(more)
        took_s = max(took_s, time.monotonic() - began_s)
        assert answer.status_code == 200, (part, answer.text)
    print(f"\n10 MB in any part: answered within {took_s:.2f} s")  # noqa: T201 - figures for the reader
    assert took_s < REFUSED_S


async def strangers(at: Scene) -> None:
    """Come as many callers, each with a key, a name and an id of its own."""
    began_s = time.monotonic()

    async def line(first: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", at.proxy.port)
        for number in range(first, STRANGERS, LINES):
            body = json.dumps({**SAID, "user": f"user-{number}"}).encode()
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-request-id: id-%d\r\n"
                b"authorization: Bearer key-%d\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (number, number, len(body), body)
            )
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert head.startswith(b"http/1.1 200 "), head
            await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
        writer.close()

    async with asyncio.TaskGroup() as group:
        for first in range(LINES):
            group.create_task(line(first))
    took_s = time.monotonic() - began_s
    print(f"{STRANGERS} callers in {took_s:.1f} s")  # noqa: T201 - figures for the reader


async def test_a_million_foreign_members_stop_no_request(tmp_path: Path) -> None:
    """A million strangers that look idler than any replica: requests go by the table."""
    ready = Keys().model(MODEL).ready
    async with scene(tmp_path) as at:
        await asyncio.to_thread(fill, at.server, ready)
        took_s: list[float] = []
        for _ in range(300):
            began_s = time.monotonic()
            assert (await at.ask({})).status_code == 200
            took_s.append(time.monotonic() - began_s)
        took_s.sort()
        print(  # noqa: T201 - figures for the reader
            f"\na million strangers: p50 {took_s[150] * 1e3:.1f} ms, longest {took_s[-1]:.2f} s"
        )
        assert took_s[-1] < ANSWERED_S
        await asyncio.to_thread(at.server.command, "ZREMRANGEBYSCORE", ready, 0, 0)


def fill(server: RedisServer, key: str) -> None:
    """Put a million strangers in a sorted set, before everybody who belongs there."""
    for first in range(0, MILLION, 50_000):
        server.command("EVAL", FILL, 1, key, first, first + 49_999)
