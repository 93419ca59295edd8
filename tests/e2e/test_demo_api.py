"""The API on real vLLM: what clients of every kind get from either proxy."""

import asyncio
import json
import socket
from collections.abc import Sequence

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.support.mesh import Mesh, ready_replicas
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.mesh, pytest.mark.timeout(420)]

QUESTION = "What is redmesh?"
MESSAGES: Sequence[ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]
LONG_TOKENS = 1900
"""A stream of so many tokens lasts for seconds."""


@pytest.fixture(params=[0, 1], ids=["first-proxy", "second-proxy"])
def url(mesh: Mesh, request: pytest.FixtureRequest) -> str:
    """Either proxy."""
    number: int = request.param
    return mesh.urls[number]


def test_the_openai_client_works_unchanged(url: str, faq: dict[str, str]) -> None:
    """The official client, synchronous: chat, streamed and not, completions, and the models."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    chat = client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0)
    assert chat.choices[0].message.content == faq[QUESTION]
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage is not None
    assert chat.usage.completion_tokens > 0
    stream = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == faq[QUESTION]
    assert chunks[-1].usage == chat.usage
    assert len({chunk.id for chunk in chunks}) == 1
    completion = client.completions.create(model="demo", prompt="redmesh", max_tokens=8)
    pieces = client.completions.create(model="demo", prompt="redmesh", max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == completion.choices[0].text
    assert "demo" in [model.id for model in client.models.list()]


async def test_the_asynchronous_openai_client_works_unchanged(
    url: str, faq: dict[str, str]
) -> None:
    """The official client, asynchronous: several streams at once, and one answer as a whole."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:

        async def streamed() -> str:
            stream = await client.chat.completions.create(
                model="demo", messages=MESSAGES, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        whole = client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0)
        texts, chat = await asyncio.gather(asyncio.gather(*(streamed() for _ in range(4))), whole)
    assert set(texts) == {faq[QUESTION]}
    assert chat.choices[0].message.content == faq[QUESTION]


def test_plain_text_in_plain_text_out(url: str, faq: dict[str, str]) -> None:
    """A prompt as text/plain is answered as text/plain, piece by piece as it is generated.

    Two engines leave proxy and client little of two cores, and an answer takes a quarter of a
    second: now and then all of one waits for its reader. So the pieces of several are counted.
    """
    path = f"{url}/v1/chat/demo?temperature=0"
    headers = {"Content-Type": "text/plain"}
    questions = [QUESTION, *(asked for asked in sorted(faq)[:5] if asked != QUESTION)]
    count = 0
    for question in questions:
        with httpx.stream("POST", path, content=question, headers=headers, timeout=60) as answer:
            pieces = list(answer.iter_text())
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain")
        assert "".join(pieces).strip() == faq[question]
        count += len([piece for piece in pieces if piece])
    assert count > 3 * len(questions)


def test_the_path_names_the_model(url: str, faq: dict[str, str]) -> None:
    """`/v1/chat/{model}` takes JSON messages, and the path wins over a model in the body."""
    body = {"model": "other", "messages": MESSAGES, "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/demo", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == faq[QUESTION]


def test_bad_requests_get_errors_of_openai_shape(url: str) -> None:
    """Unknown model 404; invalid JSON and a context too long 400; the error says what is wrong."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="nonsense", messages=MESSAGES)
    assert "nonsense" in str(unknown.value)
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo", prompt="mesh " * 4000)
    assert "2048" in str(long.value)
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(
                model="demo", messages=MESSAGES, max_tokens=100_000, stream=stream
            )
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/chat/demo"):
        broken = httpx.post(f"{url}{path}", content=b'{"model": "demo", ', headers=headers)
        assert broken.status_code == 400, path
        assert {"message", "type", "param", "code"} <= set(broken.json()["error"]), path


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_a_client_that_goes_away_stops_its_engine(mesh: Mesh, stream: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """Within a second after its client has gone, an engine works on nothing any more."""
    body = json.dumps(
        {
            "model": "demo",
            "messages": list(MESSAGES),
            "max_tokens": LONG_TOKENS,
            "ignore_eos": True,
            "stream": stream,
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: mesh\r\nContent-Length: {len(body)}\r\n"
        "Content-Type: application/json\r\n\r\n"
    )
    # No connection is used twice: an engine that was busy for five seconds closes one that waited
    # so long, although it has been asked on it.
    once = httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_keepalive_connections=0))
    async with mesh.registry() as registry, once as client:
        engines = [replica.url for replica in (await ready_replicas(registry, "demo")).values()]

        async def total(metric: str) -> float:
            pages = await asyncio.gather(*(client.get(f"{each}/metrics") for each in engines))
            return sum(
                float(line.rsplit(" ", 1)[1])
                for page in pages
                for line in page.text.splitlines()
                if line.startswith(f"vllm:{metric}{{")
            )

        async def running(count: int) -> bool:
            return await total("num_requests_running") == count

        await wait_until(lambda: running(0), what="the engines are idle")
        before = await total("generation_tokens_total")
        with socket.create_connection(("127.0.0.1", mesh.ports[0])) as connection:
            connection.sendall(head.encode() + body)
            await wait_until(lambda: running(1), what="an engine works on the request")
        await wait_until(lambda: running(0), timeout_s=1.0, what="no engine works on it any more")
        assert await total("generation_tokens_total") - before < LONG_TOKENS
        await wait_until(lambda: _released(mesh), what="its reservation is given back")


async def _released(mesh: Mesh) -> bool:
    async with mesh.registry() as registry:
        totals = await registry.ledger.totals("demo")
        return all(each.requests == 0 for each in totals.values())
