"""Responses, Messages, pooling, tokenizer, models, health and metrics over HTTP."""

import base64
import re
import struct
from collections.abc import Awaitable, Callable
from typing import Any

from services.simengine import text
from tests.support.waiting import wait_until
from tests.unit.simengine.driving import Started

Start = Callable[..., Awaitable[Started]]
MESSAGES = [{"role": "user", "content": "Tell me about streams"}]


async def test_responses_whole_and_streamed_say_the_same(start: Start) -> None:
    """The stream's events begin with created, end with completed, and add up to the text."""
    engine = await start("--mean-answer-tokens", "0")
    ask: dict[str, Any] = {"input": "hi", "temperature": 0, "max_output_tokens": 12}
    whole = await engine.ok("/v1/responses", **ask)
    assert whole["status"] == "incomplete"
    assert whole["usage"]["output_tokens"] == 12
    said = whole["output"][0]["content"][0]["text"]
    stream = await engine.stream("/v1/responses", **ask)
    assert (stream.names[0], stream.names[-1]) == ("response.created", "response.completed")
    assert [chunk["sequence_number"] for chunk in stream.chunks] == list(range(len(stream.chunks)))
    deltas = [chunk["delta"] for chunk in stream.chunks if chunk["type"].endswith("text.delta")]
    assert "".join(deltas) == said
    assert stream.chunks[-1]["response"]["output"][0]["content"][0]["text"] == said
    assert not stream.done


async def test_messages_whole_and_streamed_say_the_same(start: Start) -> None:
    """Anthropic's events in their order, with stop reason and usage."""
    engine = await start("--mean-answer-tokens", "0")
    ask: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    whole = await engine.ok("/v1/messages", system="be brief", **ask)
    assert whole["stop_reason"] == "max_tokens"
    assert whole["usage"]["output_tokens"] == 12
    stream = await engine.stream("/v1/messages", system="be brief", **ask)
    assert stream.names[:2] == ["message_start", "content_block_start"]
    assert stream.names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    deltas = [
        chunk["delta"]["text"] for chunk in stream.chunks if "delta" in chunk and "index" in chunk
    ]
    assert "".join(deltas) == whole["content"][0]["text"]
    count = await engine.ok("/v1/messages/count_tokens", system="be brief", messages=MESSAGES)
    assert count == {"input_tokens": whole["usage"]["input_tokens"]}


async def test_a_messages_stop_sequence_is_named(start: Start) -> None:
    """stop_sequences end the answer with stop_reason stop_sequence."""
    engine = await start("--mean-answer-tokens", "0")
    ask: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 60}
    stop = (await engine.ok("/v1/messages", **ask))["content"][0]["text"][30:40]
    body = await engine.ok("/v1/messages", stop_sequences=[stop], **ask)
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", stop)


async def test_messages_errors_have_anthropics_shape(start: Start) -> None:
    """An unknown model is a not_found_error."""
    engine = await start()
    response = await engine.post("/v1/messages", model="x", messages=MESSAGES, max_tokens=1)
    assert response.status_code == 404
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "not_found_error"


async def test_a_pooling_engine_embeds_and_does_not_generate(start: Start) -> None:
    """Unit vectors of 384 numbers, the same each time, near for texts that share words."""
    engine = await start("--runner", "pooling")
    texts = ["a replica died", "a replica was dead", "cheese"]
    body = await engine.ok("/v1/embeddings", model="tiny", input=texts)
    vectors = [item["embedding"] for item in body["data"]]
    assert {len(vector) for vector in vectors} == {384}
    assert abs(sum(value * value for value in vectors[0]) - 1) < 1e-6
    near, far = (
        sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors[1:]
    )
    assert near > far
    packed = await engine.ok("/v1/embeddings", input=texts[0], encoding_format="base64")
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert abs(struct.unpack("384f", raw)[7] - vectors[0][7]) < 1e-6
    assert body["usage"]["total_tokens"] == sum(len(text.encode_prompt(each)) for each in texts)
    response = await engine.post("/v1/completions", prompt="a")
    assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})
    response = await engine.post("/v1/embeddings", input="a", dimensions=3)
    assert response.status_code == 400


async def test_a_generating_engine_does_not_embed(start: Start) -> None:
    """/v1/embeddings is not there at all."""
    engine = await start()
    response = await engine.post("/v1/embeddings", input="a")
    assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})


async def test_rerank_orders_and_score_compares(start: Start) -> None:
    """The document that shares words comes first, and its score is the pair's score."""
    engine = await start("--runner", "pooling")
    documents = ["cheese", "a replica was dead"]
    body = await engine.ok("/v1/rerank", query="a replica died", documents=documents)
    assert [item["index"] for item in body["results"]] == [1, 0]
    body_of_one = await engine.ok("/rerank", query="a replica died", documents=documents, top_n=1)
    assert len(body_of_one["results"]) == 1
    scores = await engine.ok("/v1/score", text_1="a replica died", text_2=documents)
    assert scores["data"][1]["score"] == body["results"][0]["relevance_score"]


async def test_tokenize_and_detokenize_are_inverse(start: Start) -> None:
    """The ids of a prompt give the prompt back; messages have ids too."""
    engine = await start()
    body = await engine.ok("/tokenize", prompt="Zürich is old", add_special_tokens=False)
    assert body["count"] == len(body["tokens"])
    back = await engine.ok("/detokenize", tokens=body["tokens"])
    assert back == {"prompt": "Zürich is old"}
    body = await engine.ok("/tokenize", messages=MESSAGES)
    assert body["tokens"] == text.encode_chat([("user", "Tell me about streams")])


async def test_models_lists_every_served_name(start: Start) -> None:
    """Each served name with the context length."""
    engine = await start("--max-model-len", "777")
    body = (await engine.client.get("/v1/models")).json()
    assert [(model["id"], model["max_model_len"]) for model in body["data"]] == [
        ("tiny", 777),
        ("alias", 777),
    ]


async def test_the_small_routes_answer(start: Start) -> None:
    """Health, ping, version and load are 200."""
    engine = await start()
    answers = {
        path: (await engine.client.get(path)) for path in ("/health", "/ping", "/version", "/load")
    }
    assert {answer.status_code for answer in answers.values()} == {200}
    assert answers["/version"].json() == {"version": "0.32.0"}
    assert answers["/load"].json() == {"server_load": 0}


def series(metrics: str, name: str) -> float:
    """Return the value of the first series of that name."""
    found = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", metrics, re.MULTILINE)
    assert found is not None, name
    return float(found.group(1))


async def test_metrics_count_what_was_done(start: Start) -> None:
    """Tokens, requests and latencies are counted under vLLM's names and labels."""
    engine = await start()
    for _ in range(2):
        await engine.ok("/v1/completions", prompt="word " * 40, max_tokens=7, ignore_eos=True)
    metrics = (await engine.client.get("/metrics")).text
    assert series(metrics, "vllm:generation_tokens_total") == 14
    assert series(metrics, "vllm:time_to_first_token_seconds_count") == 2
    assert series(metrics, "vllm:inter_token_latency_seconds_count") == 12
    assert series(metrics, "vllm:e2e_request_latency_seconds_count") == 2
    assert series(metrics, "vllm:prefix_cache_hits_total") > 0
    assert series(metrics, "vllm:num_requests_running") == 0
    assert 'vllm:num_requests_waiting{engine="0",model_name="tiny"} 0.0' in metrics
    assert 'finished_reason="length"} 2.0' in metrics
    assert (
        'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 2.0' in metrics
    )


async def test_gauges_show_load_and_fall_back(start: Start) -> None:
    """Running, waiting and KV use rise with requests and are zero once their clients left."""
    engine = await start("--max-num-seqs", "1", "--step-ms", "5")
    held = [
        engine.client.build_request(
            "POST",
            "/v1/completions",
            json={"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True},
        )
        for _ in range(2)
    ]
    responses = [await engine.client.send(request, stream=True) for request in held]

    async def gauges() -> tuple[float, float, bool]:
        metrics = (await engine.client.get("/metrics")).text
        return (
            series(metrics, "vllm:num_requests_running"),
            series(metrics, "vllm:num_requests_waiting"),
            series(metrics, "vllm:kv_cache_usage_perc") > 0,
        )

    async def loaded() -> bool:
        return await gauges() == (1, 1, True)

    async def empty() -> bool:
        return await gauges() == (0, 0, False)

    await wait_until(loaded, what="one runs and one waits")
    for response in responses:
        await response.aclose()
    await wait_until(empty, what="the gauges fall back to zero")
