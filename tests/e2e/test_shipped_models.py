"""The deployments that ship, each on a tiny checkpoint of its architecture."""

import asyncio
import functools
import json
import re
import subprocess
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.mesh import ROOT, Mesh, ready_replicas, write_models
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.mesh, pytest.mark.timeout(420)]

START_S = 150.0
README = ROOT / "README.md"
EMBEDDING = "embedding"
# One engine that starts keeps one core busy, so two start in the time of one. All four at once
# would want more memory than a small machine has: phi2 alone declares 9 GiB.
LLAMA_AND_GPT = pytest.mark.parametrize(
    "served", [("tinyllama", "gpt2")], indirect=True, ids="+".join
)
PHI_AND_BERT = pytest.mark.parametrize("served", [("phi2", EMBEDDING)], indirect=True, ids="+".join)


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest,
    mesh: Mesh,
    checkpoints: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Generator[None]:
    """Declare some models, wait until all serve, and forget them afterwards: memory is dear."""
    names: tuple[str, ...] = request.param
    folder = tmp_path_factory.mktemp("models")
    for name in names:
        done = mesh.redmesh("apply", "-f", declared(name, checkpoints, folder))
        assert done.code == 0, done
    try:
        asyncio.run(_serve(mesh, names))
        yield
    finally:
        for name in names:
            done = mesh.redmesh("delete", name)
            assert done.code == 0, done
        asyncio.run(_gone(mesh, names))


async def _serve(mesh: Mesh, names: Sequence[str]) -> None:
    async with mesh.registry() as registry, httpx.AsyncClient() as client:

        async def known(name: str) -> bool:
            lists = [await client.get(f"{url}/v1/models") for url in mesh.urls]
            return all(name in page.text for page in lists)

        for name in names:
            await wait_until(
                functools.partial(ready_replicas, registry, name),
                timeout_s=START_S,
                interval_s=0.2,
                what=f"{name} is READY",
            )
            await wait_until(functools.partial(known, name), what="every proxy knows it")


async def _gone(mesh: Mesh, names: Sequence[str]) -> None:
    async with mesh.registry() as registry:

        async def gone(name: str) -> bool:
            return not (await registry.replicas.snapshot(name)).replicas

        for name in names:
            each = functools.partial(gone, name)
            await wait_until(each, timeout_s=60, interval_s=0.2, what=f"{name} is gone")


def declared(name: str, checkpoints: Path, folder: Path) -> Path:
    """Write a models file: the shipped one with nothing but the path of the weights changed."""
    if name == EMBEDDING:
        engine = {
            "model": str(checkpoints / name),
            "runner": "pooling",
            "max_model_len_tokens": 512,
        }
        return write_models(folder / f"{name}.json", {"name": name, "engine": engine})
    shipped = ROOT / "deploy" / "models"
    document: dict[str, Any] = json.loads((shipped / f"{name}.json").read_text())
    (model,) = document["models"]
    model["engine"]["model"] = str(checkpoints / name)
    if "chat_template" in model["engine"]:  # stays the shipped one, seen from another folder
        model["engine"]["chat_template"] = str(shipped / model["engine"]["chat_template"])
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document))
    return path


async def printed_call(path: str, port: int) -> str:
    """Run the README's curl call to `path` as it is printed there, but for the port."""
    calls = re.findall(r"^curl (?:[^\n]*\\\n)*[^\n]*$", README.read_text(), re.MULTILINE)
    (call,) = (call for call in calls if path in call)
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c"),
        f"{call.replace(':8000', f':{port}')} --silent --show-error --fail-with-body -m 90",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, (call, output)
    return output.decode()


async def post(url: str, body: dict[str, Any]) -> httpx.Response:
    """Ask a proxy."""
    async with httpx.AsyncClient(timeout=60) as client:
        return await client.post(url, json=body)


@LLAMA_AND_GPT
async def test_tinyllama_streams_json_to_curl(mesh: Mesh, served: None) -> None:
    """The README's curl call with `stream: true` gets SSE chunks; its hub id works as well."""
    output = await printed_call("/v1/chat/tinyllama", mesh.ports[0])
    events = output.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] is not None
    body = {
        "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "messages": [{"role": "user", "content": "Tell me a story"}],
        "max_tokens": 4,
    }
    answer = await post(f"{mesh.urls[1]}/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text


@LLAMA_AND_GPT
async def test_gpt2_streams_plain_text_to_curl(mesh: Mesh, served: None) -> None:
    """The README's curl call with a plain prompt gets plain text from a base model."""
    output = await printed_call("/v1/chat/gpt2", mesh.ports[0])
    assert output.strip()
    assert "data:" not in output


@PHI_AND_BERT
async def test_phi2_answers(mesh: Mesh, served: None) -> None:
    """Phi-2's deployment serves chat, by the default template for base models, and completions."""
    for path, question in (
        ("chat/completions", {"messages": [{"role": "user", "content": "Why?"}]}),
        ("completions", {"prompt": "Why"}),
    ):
        for name in ("phi2", "microsoft/phi-2"):
            body = {"model": name, "max_tokens": 8, "ignore_eos": True, **question}
            answer = await post(f"{mesh.urls[0]}/v1/{path}", body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 8


@PHI_AND_BERT
async def test_a_pooling_model_embeds(mesh: Mesh, served: None) -> None:
    """A deployment with the pooling runner serves embeddings, and refuses to chat."""
    body = {"model": EMBEDDING, "input": ["a replica died", "a server crashed"]}
    for url in mesh.urls:
        answer = await post(f"{url}/v1/embeddings", body)
        assert answer.status_code == 200, answer.text
        vectors = [entry["embedding"] for entry in answer.json()["data"]]
        assert [len(vector) for vector in vectors] == [128, 128]
        assert vectors[0] != vectors[1]
    chat = {"model": EMBEDDING, "messages": [{"role": "user", "content": "hello"}]}
    refusal = await post(f"{mesh.urls[0]}/v1/chat/completions", chat)
    assert 400 <= refusal.status_code < 500, refusal.text
