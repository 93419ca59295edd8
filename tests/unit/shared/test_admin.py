import asyncio

import prometheus_client
import pytest

from shared.admin import AdminServer, fetch, health_routes, json_answer, metrics_route


async def test_a_route_answers_its_json() -> None:
    """A GET on a known path returns what its route says."""
    async with AdminServer("127.0.0.1", 0, {"/x": lambda: json_answer({"a": 1})}) as server:
        assert await fetch(server.url + "/x") == b'{"a":1}'


async def test_an_unknown_path_names_the_known_ones() -> None:
    """A wrong path is answered 404 with the list of pages, so that a person finds the right one."""
    async with AdminServer("127.0.0.1", 0, {"/x": lambda: json_answer({})}) as server:
        with pytest.raises(ValueError, match="404"):
            await fetch(server.url + "/y")
        raw = await _raw(server.url, b"GET /y HTTP/1.1\r\n\r\n")
    assert b"there are: /x" in raw


async def test_readiness_tells_the_reason() -> None:
    """A service that is not ready answers 503 and says why; once ready, 200."""
    reasons: list[str | None] = ["no table yet"]
    routes = health_routes(lambda: reasons[0])
    async with AdminServer("127.0.0.1", 0, routes) as server:
        raw = await _raw(server.url, b"GET /health/ready HTTP/1.1\r\n\r\n")
        assert b" 503 " in raw
        assert b"no table yet" in raw
        reasons[0] = None
        assert b'"ready"' in await fetch(server.url + "/health/ready")
        assert b'"live"' in await fetch(server.url + "/health/live")


async def test_metrics_are_in_prometheus_format() -> None:
    """The metrics page holds the registry's metrics in Prometheus' text format."""
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.Counter("things", "Things.", registry=registry).inc()
    async with AdminServer("127.0.0.1", 0, metrics_route(registry)) as server:
        assert b"things_total 1.0" in await fetch(server.url + "/metrics")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [(b"POST /x HTTP/1.1\r\n\r\n", b" 405 "), (b"nonsense\r\n\r\n", b" 400 ")],
)
async def test_what_is_not_a_get_is_refused(request_bytes: bytes, status: bytes) -> None:
    """Other methods and malformed requests get a clear refusal, not a traceback."""
    async with AdminServer("127.0.0.1", 0, {"/x": lambda: json_answer({})}) as server:
        assert status in await _raw(server.url, request_bytes)


async def test_an_endless_head_is_cut_off() -> None:
    """A request head above the limit is dropped without an answer."""
    async with AdminServer("127.0.0.1", 0, {"/x": lambda: json_answer({})}) as server:
        try:
            answer = await _raw(server.url, b"GET /x HTTP/1.1\r\n" + b"a: b\r\n" * 20_000)
        except ConnectionError:
            answer = b""
        assert answer == b""
        assert await fetch(server.url + "/x") == b"{}"


async def _raw(url: str, request: bytes) -> bytes:
    host, _, port = url.removeprefix("http://").rpartition(":")
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(request)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()
