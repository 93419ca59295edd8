"""Every refusal has the real engine's status and body."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.support.waiting import wait_until
from tests.unit.simengine.driving import Started

Start = Callable[..., Awaitable[Started]]
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BUSY = {
    "error": {
        "message": "The engine is currently busy and cannot accept new requests. "
        "Please try again later or on a different instance.",
        "type": "Service Unavailable",
        "param": None,
        "code": 503,
    }
}


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "param"),
    [
        (COMPLETIONS, {"prompt": "a", "model": "x"}, 404, "NotFoundError", "model"),
        (COMPLETIONS, {}, 400, "Bad Request", "body.prompt"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "x"}, 400, "Bad Request", "body.max_tokens"),
        (COMPLETIONS, {"prompt": []}, 400, "BadRequestError", "prompt"),
        (COMPLETIONS, {"prompt": [999999]}, 400, "BadRequestError", "prompt"),
        (COMPLETIONS, {"prompt": ["a", 5]}, 400, "Bad Request", "body.prompt"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "BadRequestError", "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 99999}, 400, "BadRequestError", "max_tokens"),
        (COMPLETIONS, {"prompt": [5] * 5000}, 400, "BadRequestError", "input_tokens"),
        (COMPLETIONS, {"prompt": "?" * 5000}, 400, "BadRequestError", "input_text"),
        (COMPLETIONS, {"prompt": "a", "temperature": -1}, 400, "BadRequestError", "temperature"),
        (COMPLETIONS, {"prompt": "a", "top_p": 2}, 400, "BadRequestError", "top_p"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, 400, "BadRequestError", "logprobs"),
        (COMPLETIONS, {"prompt": "a", "n": 2, "temperature": 0}, 400, "BadRequestError", "n"),
        (COMPLETIONS, {"prompt": "a", "stop": [""]}, 400, "BadRequestError", "stop"),
        (CHAT, {"messages": []}, 400, "Bad Request", "body.messages"),
        (CHAT, {"messages": [{"role": 1}]}, 400, "Bad Request", "body.messages.0.role"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]},
            400,
            "BadRequestError",
            "tool_choice",
        ),
    ],
)
async def test_a_bad_request_names_its_field(
    start: Start,
    path: str,
    body: dict[str, Any],
    status: int,
    kind: str | None,
    param: str | None,
) -> None:
    """Streamed or not, the answer is a plain JSON error with code, type and param."""
    engine = await start()
    for streamed in (False, True):
        response = await engine.post(path, **body, stream=streamed)
        assert response.status_code == status
        assert response.headers["content-type"] == "application/json"
        error = response.json()["error"]
        assert (error["type"], error["param"], error["code"]) == (kind, param, status)
        assert error["message"]


async def test_invalid_json_says_where(start: Start) -> None:
    """The param is the byte at which the body stops being JSON."""
    engine = await start()
    for body in (b'{"prompt": "a", "max', b'{"prompt": a}', b"\xff\xfe"):
        response = await engine.client.post(
            COMPLETIONS, content=body, headers={"content-type": "application/json"}
        )
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "Bad Request"
        assert response.json()["error"]["param"].startswith("body.")


async def test_only_json_is_taken_whatever_its_charset(start: Start) -> None:
    """Another content type is a 400, not a 415; a charset parameter is fine."""
    engine = await start()
    body = b'{"prompt": "a", "max_tokens": 1, "unknown": 1}'
    statuses = {
        kind: (
            await engine.client.post(COMPLETIONS, content=body, headers={"content-type": kind})
        ).status_code
        for kind in ("text/plain", "application/json; charset=utf-8")
    }
    assert statuses == {"text/plain": 400, "application/json; charset=utf-8": 200}


async def test_paths_and_methods_have_the_other_shape(start: Start) -> None:
    """404 and 405 of the web framework carry only a detail."""
    engine = await start()
    response = await engine.client.get(COMPLETIONS)
    assert (response.status_code, response.json()) == (405, {"detail": "Method Not Allowed"})
    response = await engine.client.get("/nothing")
    assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})


async def test_the_key_guards_v1_alone(start: Start) -> None:
    """Without or with a wrong key /v1 is 401 with a bare string; /health and /tokenize are open."""
    engine = await start(key="secret")
    for headers in ({}, {"authorization": "Bearer wrong"}):
        response = await engine.client.get("/v1/models", headers=headers)
        assert (response.status_code, response.json()) == (401, {"error": "Unauthorized"})
    response = await engine.client.get("/v1/models", headers={"authorization": "Bearer secret"})
    assert response.status_code == 200
    assert (await engine.client.get("/health")).status_code == 200
    assert (await engine.post("/tokenize", prompt="a")).status_code == 200


async def test_a_full_queue_is_503_before_any_event(start: Start) -> None:
    """With 2 in flight of 2 allowed the third is refused, streamed or not, and counted."""
    engine = await start("--max-num-seqs", "1", "--max-num-queued-reqs", "2")
    body = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    requests = [engine.client.build_request("POST", COMPLETIONS, json=body) for _ in range(2)]
    held = [await engine.client.send(request, stream=True) for request in requests]
    for streamed in (False, True):
        response = await engine.post(COMPLETIONS, prompt="a", stream=streamed)
        assert (response.status_code, response.json()) == (503, BUSY)
        assert "retry-after" not in response.headers
    metrics = (await engine.client.get("/metrics")).text
    assert (
        'admission_rejections_total{model_name="tiny",reason="max_num_queued_reqs"} 2.0' in metrics
    )
    for response in held:
        await response.aclose()
    await wait_until(lambda: not engine.simulator.engine.in_flight, what="room again")
    assert (await engine.post(COMPLETIONS, prompt="a", max_tokens=1)).status_code == 200


async def test_what_is_not_http_is_told_so(start: Start) -> None:
    """Garbage gets a 400 and a closed connection, and the engine lives on."""
    engine = await start()
    port = engine.simulator.server.port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"\x00\x01 nonsense\r\n\r\n")
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert (await engine.client.get("/health")).status_code == 200
