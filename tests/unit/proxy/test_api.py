"""Routes and refusals: what a client meets before a replica is asked."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from services.proxy.paths import ROUTES, Route
from tests.support.waiting import wait_until
from tests.unit.proxy.engine import Engine, Exchanged
from tests.unit.proxy.rig import Rig, chat

PATH = "/v1/chat/completions"


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: str(route.path))
async def test_routes_reach_the_replica(route: Route) -> None:
    """Each route of the allow-list reaches the same route of a replica."""

    async def echo(exchanged: Exchanged) -> None:
        await exchanged.whole(200, json.dumps({"path": exchanged.path}).encode())

    async with Engine(echo) as engine, Rig(engine) as rig:
        answer = await rig.http.post(route.path, json={"model": "demo", "input": "x"})
        assert answer.json() == {"path": route.upstream.decode()}


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code", "param"),
    [
        (b"{", "application/json", 400, "invalid_json", None),
        (b"", "application/json", 400, "invalid_json", None),
        (b"[]", "application/json", 400, "invalid_field", "body"),
        (b"\xff\xfe", "application/json", 400, "invalid_json", None),
        (b'{"model":"\xff"}', "application/json", 400, "invalid_json", None),
        (b"{}", "application/json", 400, "invalid_field", "model"),
        (b'{"model": 3}', "application/json", 400, "invalid_field", "model"),
        (b'{"model": "nope"}', "application/json", 404, "model_not_found", "model"),
        (b'{"model": "demo"}', "text/html", 415, "unsupported_media_type", "content-type"),
        (b'{"model": "demo"}', "", 415, "unsupported_media_type", "content-type"),
        (b'{"x":' + b"[" * 3000, "application/json", 400, "invalid_json", None),
        (b'{"model":' + b"[" * 3000, "application/json", 400, "invalid_json", None),
        (b"x" * 5000, "application/json", 413, "body_too_large", None),
    ],
)
async def test_refusals(
    content: bytes, content_type: str, status: int, code: str, param: str | None
) -> None:
    """Each bad request gets its status, its code, the field it is about, and a request id."""
    async with Engine() as engine, Rig(engine, max_body_bytes=4000) as rig:
        headers = {"content-type": content_type} if content_type else {}
        answer = await rig.http.post(PATH, content=content, headers=headers)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
        assert error["type"] == "invalid_request_error"
        assert answer.headers["x-request-id"]
        assert not engine.seen


async def test_unknown_model_names_known_ones() -> None:
    """The 404 of an unknown model names the models that exist."""
    async with Rig() as rig:
        answer = await rig.http.post(PATH, json={"model": "zzz"})
        assert "models here: demo" in answer.json()["error"]["message"]


async def test_starting() -> None:
    """Before the catalogue has been read, an unknown model is no 404: it may well exist."""
    async with Rig() as rig:
        rig.tables.catalogued = False
        answer = await rig.http.post(PATH, json={"model": "zzz"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "starting")
        assert answer.headers["retry-after"] == "1"


async def test_anthropic_errors() -> None:
    """Errors of /v1/messages have Anthropic's shape."""
    async with Rig() as rig:
        answer = await rig.http.post("/v1/messages", json={"model": "zzz"})
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", PATH, 405, "method_not_allowed"),
        ("GET", "/v1/chat/demo", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/nowhere", 404, "route_not_found"),
        ("POST", "/invocations", 404, "route_not_found"),
        ("POST", "/v1/chat", 404, "route_not_found"),
        ("POST", "/v1/chatter", 404, "route_not_found"),
        ("POST", "/v1/load_lora_adapter", 404, "route_not_found"),
    ],
)
async def test_unknown_routes(method: str, path: str, status: int, code: str) -> None:
    """Routes and methods that do not exist are refused in the same shape; nothing is passed on."""
    async with Engine() as engine, Rig(engine) as rig:
        answer = await rig.http.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert not engine.seen


async def test_route_that_the_engine_lacks() -> None:
    """A route that the model's engine does not have is explained in OpenAI's shape."""

    async def not_found(exchanged: Exchanged) -> None:
        await exchanged.whole(404, b'{"detail":"Not Found"}')

    async with Engine(not_found) as engine, Rig(engine) as rig:
        answer = await rig.http.post("/v1/embeddings", json={"model": "demo", "input": "x"})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "route_not_served"


async def test_models() -> None:
    """Models are listed in OpenAI's shape, and found by name or alias, slashes included."""
    async with Rig() as rig:
        listed = (await rig.http.get("/v1/models")).json()
        assert [one["id"] for one in listed["data"]] == ["demo"]
        one = (await rig.http.get("/v1/models/org/Demo-1B")).json()
        assert (one["id"], one["object"]) == ("demo", "model")
        missing = await rig.http.get("/v1/models/zzz")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"


async def test_health() -> None:
    """Live is always yes; ready says why not."""
    async with Rig() as rig:
        assert (await rig.http.get("/health/live")).json() == {"status": "live"}
        assert (await rig.http.get("/health/ready")).status_code == 200
        rig.not_ready = "draining"
        answer = await rig.http.get("/health/ready")
        assert (answer.status_code, answer.json()["reason"]) == (503, "draining")
        assert (await rig.http.get("/metrics")).text == "# metrics\n"


async def test_metrics_that_cannot_be_summed_up() -> None:
    """A worker whose parent does not answer says so, rather than show less than all."""
    async with Rig() as rig:
        rig.no_metrics = True
        answer = await rig.http.get("/metrics")
        assert answer.status_code == 503
        assert "ask again" in answer.json()["error"]["message"]


async def test_openapi_documents_engine_routes() -> None:
    """The OpenAPI document lists the engine's routes too."""
    async with Rig() as rig:
        paths = (await rig.http.get("/schema/openapi.json")).json()["paths"]
        assert {route.path for route in ROUTES} <= paths.keys()
        assert "/v1/chat/{model}" in paths


@pytest.mark.parametrize(
    "path", ["/v1/chat/org/Demo-1B", "/v1/chat/org%2FDemo-1B", "/v1/chat/demo"]
)
async def test_path_addressed(path: str) -> None:
    """A model in the path wins over the body's, also with slashes and as an alias."""
    async with Engine() as engine, Rig(engine) as rig:
        body = b'{"model": "zzz", "messages": [{"role":"user","content":"\xc3\xa9"}], "n" : 1.0}'
        answer = await rig.http.post(
            path, content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 200
        seen = engine.seen[0]
        assert seen.path == PATH
        assert seen.json["model"] == "demo"
        assert b'"n":1.0' in seen.body
        assert b'{"role":"user","content":"\xc3\xa9"}' in seen.body


async def test_path_addressed_without_model_in_body() -> None:
    """A path-addressed body may leave the model out."""
    async with Engine() as engine, Rig(engine) as rig:
        answer = await rig.http.post("/v1/chat/demo", json={"messages": [], "n": 2})
        assert answer.status_code == 200
        assert engine.seen[0].json == {"messages": [], "n": 2, "model": "demo"}


@pytest.mark.parametrize(
    ("path", "content", "content_type", "status"),
    [
        ("/v1/chat/zzz", b"hi", "text/plain", 404),
        ("/v1/chat/demo", b"hi", "application/x-www-form-urlencoded", 415),
        ("/v1/chat/demo", b" ", "text/plain", 400),
        ("/v1/chat/demo", b"\xff", "text/plain", 400),
        ("/v1/chat/demo", b"{", "application/json", 400),
        ("/v1/chat/demo?max_tokens=many", b"hi", "text/plain", 400),
        ("/v1/chat/demo?temperature=nan", b"hi", "text/plain", 400),
        (f"/v1/chat/demo?seed={'1' * 400}", b"hi", "text/plain", 400),
        ("/v1/chat/demo", b'{"x":' + b"[" * 3000, "application/json", 400),
        ("/v1/chat/demo?colour=blue", b"hi", "text/plain", 400),
    ],
)
async def test_path_addressed_refusals(
    path: str, content: bytes, content_type: str, status: int
) -> None:
    """Bad path-addressed requests are refused before a replica sees them."""
    async with Engine() as engine, Rig(engine) as rig:
        answer = await rig.http.post(path, content=content, headers={"content-type": content_type})
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
        assert not engine.seen


async def test_text() -> None:
    """A plain-text prompt gets plain text back, as it is generated."""
    go = asyncio.Event()

    async def paced(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        await exchanged.text("")
        await exchanged.text("Once ")
        await go.wait()
        await exchanged.text("upon", "stop")
        await exchanged.end_stream()

    async with Engine(paced) as engine, Rig(engine) as rig:
        query = "?max_tokens=5&temperature=0.5&stop=a&stop=b&seed=1&top_p=1"
        reader, writer = await rig.raw(b"Tell me", f"/v1/chat/demo{query}", "text/plain")
        head = await reader.readuntil(b"Once ")
        assert b"content-type: text/plain; charset=utf-8" in head
        go.set()
        assert b"upon" in await reader.readuntil(b"0\r\n\r\n")
        writer.close()
        assert engine.seen[0].json == {
            "model": "demo",
            "messages": [{"role": "user", "content": "Tell me"}],
            "stream": True,
            "max_tokens": 5,
            "temperature": 0.5,
            "top_p": 1.0,
            "seed": 1,
            "stop": ["a", "b"],
            "return_token_ids": True,
        }
        await wait_until(rig.idle)


async def test_text_split_inside_a_character() -> None:
    """Text whose bytes are cut anywhere by the network arrives as whole characters."""
    event = 'data: {"choices":[{"delta":{"content":"naïve 日本 🙂"},"finish_reason":"stop"}]}\n\n'

    async def dribble(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        raw = event.encode()
        for at in range(0, len(raw), 3):
            await exchanged.chunk(raw[at : at + 3])
            await asyncio.sleep(0)
        await exchanged.end_stream()

    async with Engine(dribble) as engine, Rig(engine) as rig:
        answer = await rig.http.post(
            "/v1/chat/demo", content=b"hi", headers={"content-type": "text/plain"}
        )
        assert answer.text == "naïve 日本 🙂"


@pytest.mark.parametrize("how", ["cut", "error", "unfinished"])
async def test_text_that_breaks_off(how: str) -> None:
    """A plain text that breaks off is cut: the client never sees a clean end."""
    seen = asyncio.Event()

    async def broken(exchanged: Exchanged) -> None:
        await exchanged.begin_stream()
        await exchanged.text("Once ")
        await seen.wait()
        if how == "cut":
            exchanged.writer.close()
            return
        if how == "error":
            await exchanged.event({"error": {"message": "no"}})
        await exchanged.end_stream()

    async with Engine(broken) as engine, Rig(engine) as rig:
        reader, writer = await rig.raw(b"hi", "/v1/chat/demo", "text/plain")
        await reader.readuntil(b"Once ")
        seen.set()
        everything = await reader.read()
        assert not everything.endswith(b"0\r\n\r\n")
        writer.close()
        await wait_until(rig.idle)


async def test_text_error_of_the_engine() -> None:
    """A 400 of the engine to a text request is passed on as JSON."""

    async def refuse(exchanged: Exchanged) -> None:
        await exchanged.whole(400, b'{"error":{"message":"too long","code":400}}')

    async with Engine(refuse) as engine, Rig(engine) as rig:
        answer = await rig.http.post(
            "/v1/chat/demo", content=b"hi", headers={"content-type": "text/plain"}
        )
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "too long")


async def test_slow_body() -> None:
    """A body that does not arrive in time gets 408."""
    async with Rig(body_timeout_s=0.2) as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(
            f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            "content-length: 100\r\n\r\n{".encode()
        )
        head = await reader.readuntil(b"\r\n")
        assert b" 408 " in head
        writer.close()


async def test_body_in_pieces() -> None:
    """A body that arrives in pieces is put together; one that grows too large gets 413."""
    async with Engine() as engine, Rig(engine, max_body_bytes=300_000) as rig:
        body = json.dumps(chat(filler="x" * 200_000)).encode()

        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(body), 50_000):
                yield body[at : at + 50_000]
                await asyncio.sleep(0)

        headers = {"content-type": "application/json"}
        answer = await rig.http.post(PATH, content=pieces(), headers=headers)
        assert answer.status_code == 200
        assert engine.seen[0].body == body
        body = b"{" + b" " * 400_000
        answer = await rig.http.post(PATH, content=pieces(), headers=headers)
        assert answer.status_code == 413


async def test_head_limits() -> None:
    """Too large a head gets 431, one that is no HTTP 400, one that never ends is dropped."""
    async with Rig(max_header_bytes=2000, header_timeout_s=0.2) as rig:
        for sent, status in ((b"GET / HTTP/1.1\r\nx: " + b"y" * 3000, 431), (b"\x16\x03\x01", 400)):
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            writer.write(sent + b"\r\n\r\n")
            answer = await reader.read()
            assert b" %d " % status in answer
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(b"POST / HTTP/1.1\r\n")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
