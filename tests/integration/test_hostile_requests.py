"""What a hostile client sends never becomes a key in Redis, an error in a script, or a crash.

A real proxy and a real Redis, before a replica that answers whatever it is asked.
"""

import asyncio
import json
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from shared.registry import open_registry
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.support.servers import RedisServer, any_binary
from tests.support.standalone import declare, proxy
from tests.support.waiting import wait_until
from tests.unit.proxy.engine import Engine

pytestmark = pytest.mark.mesh

MODEL: Final = "sim"
CHAT: Final = "/v1/chat/completions"
JSON: Final = {"content-type": "application/json"}
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
    "x" * 100_000,
)
COSTS: Final = ("NaN", "Infinity", "-Infinity", "1e308", "-5", "0", "9" * 40, "1.5", '"5"', "[]")
IDS: Final = ("a}:{b", "x" * 7000, "%00%0d%0a", "*", "' or 1=1")
STRANGERS: Final = 100


def keys(server: RedisServer) -> set[bytes]:
    """Name every key there is."""
    return set(server.command("KEYS", "*"))


async def test_nothing_a_client_names_becomes_a_key(tmp_path: Path) -> None:
    """Models, ids, costs and callers of every kind: refused or served, and Redis holds no more."""
    server = RedisServer(any_binary(), tmp_path / "redis")
    registry = await open_registry(CommonSettings(redis_url=Secret(server.url)))
    asked: list[dict[str, Any]] = []
    async with Engine() as engine:
        await declare(registry, MODEL, [engine.url])
        log = tmp_path / "proxy.log"
        async with (
            proxy(server.url, log=str(log)) as one,
            httpx.AsyncClient(base_url=one.url, timeout=20) as http,
        ):
            await wait_until(lambda: one.serves(MODEL), timeout_s=60, what="it serves")
            said = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
            assert (await http.post(CHAT, json=said)).status_code == 200
            before = await asyncio.to_thread(keys, server)
            served = len(engine.seen)
            for name in MODELS:
                body = json.dumps({**said, "model": name})
                answer = await http.post(CHAT, content=body, headers=JSON)
                assert answer.status_code in {400, 404}, (name[:40], answer.text)
                assert answer.json()["error"]["message"]
            answer = await http.post("/v1/chat/a%7D:%7Bb", json={"messages": said["messages"]})
            assert answer.status_code in {400, 404}, answer.text
            assert len(engine.seen) == served, "an unknown model reached a replica"
            for cost in COSTS:
                body = f'{{"model":"{MODEL}","messages":[],"max_tokens":{cost}}}'
                answer = await http.post(CHAT, content=body, headers=JSON)
                assert answer.status_code < 500, (cost, answer.text)
                asked.append({"cost": cost, "status": answer.status_code})
            for request_id in IDS:
                answer = await http.post(CHAT, json=said, headers={"x-request-id": request_id})
                assert answer.status_code < 500, (request_id[:40], answer.text)
            for number in range(STRANGERS):
                stranger = f"stranger-{number}"
                answer = await http.post(
                    CHAT,
                    json={**said, "user": stranger},
                    headers={"authorization": f"Bearer {stranger}"},
                )
                assert answer.status_code == 200

            async def given_back() -> bool:
                totals = await registry.ledger.totals(MODEL)
                return all(total.requests == 0 for total in totals.values())

            await wait_until(given_back, what="no reservation is left")
            after = await asyncio.to_thread(keys, server)
            assert await one.ready()
    assert after - before == set(), "a client made keys"
    told = log.read_text()
    assert "user_script" not in told, told[-2000:]
    assert "Traceback" not in told, told[-2000:]
    print(f"\n{len(before)} keys before, {len(after)} after; {asked}")  # noqa: T201 - figures for the reader
    await registry.aclose()
    server.kill()
