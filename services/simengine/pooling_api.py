"""Routes of an engine started with `--runner pooling`: embeddings, rerank and score.

A text's vector is a sum over its tokens, so texts that share words are near each other, and it
is the same on every replica.
"""

import base64
import math
from array import array
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Final

import msgspec

from services.simengine import requests
from services.simengine.answers import CollectedAnswer, Result
from services.simengine.engine import RunSettings
from services.simengine.refusals import RefusalError, bad_request, read_body
from services.simengine.serving import Serving, now_unix_s, prompts_of, request_id, usage
from services.simengine.text import BOS, encode_prompt
from services.simengine.wire import Exchange

DIMENSIONS: Final = 384
_SPOTS_PER_TOKEN: Final = 12
_POOLING: Final = RunSettings(max_tokens=1, pooling=True)


def embeddings(serving: Serving, exchange: Exchange) -> None:
    """Embed one or several texts or token lists."""
    content_type = exchange.headers.get(b"content-type", b"")
    request = read_body(exchange.body, content_type, requests.EMBEDDING)
    serving.check_model(request.model)
    if request.dimensions is not None:
        message = f'Model "{serving.name}" does not support matryoshka representation, '
        raise bad_request(message + "changing output dimensions will lead to poor results.")
    if request.encoding_format not in {"float", "base64"}:
        message = "encoding_format must be 'float' or 'base64'"
        raise RefusalError(400, "Bad Request", message, "body.encoding_format")
    as_base64 = request.encoding_format == "base64"
    name = f"embd-{request_id(exchange)}"

    def body(answer: CollectedAnswer, results: list[Result]) -> bytes:
        data: list[dict[str, object]] = []
        for at, result in enumerate(results):
            vector = _vector(tuple(result.run.scheduled.ids))
            value: object = list(vector)
            if as_base64:
                value = base64.b64encode(array("f", vector).tobytes()).decode()
            data.append({"index": at, "object": "embedding", "embedding": value})
        return msgspec.json.encode(
            {
                "id": name,
                "object": "list",
                "created": now_unix_s(),
                "model": serving.name,
                "data": data,
                "usage": usage(answer.prompt_tokens, 0),
            }
        )

    _run(serving, exchange, name, prompts_of(request.input), body)


def rerank(serving: Serving, exchange: Exchange) -> None:
    """Order documents by their nearness to a query."""
    content_type = exchange.headers.get(b"content-type", b"")
    request = read_body(exchange.body, content_type, requests.RERANK)
    serving.check_model(request.model)
    name = f"rerank-{request_id(exchange)}"

    def body(answer: CollectedAnswer, results: list[Result]) -> bytes:
        scores = _scores(results, [0] * len(request.documents))
        order = sorted(range(len(scores)), key=lambda at: -scores[at])
        ranked = [
            {
                "index": at,
                "document": {"text": request.documents[at], "multi_modal": None},
                "relevance_score": scores[at],
            }
            for at in order[: request.top_n or None]
        ]
        return msgspec.json.encode(
            {
                "id": name,
                "model": serving.name,
                "usage": {
                    "prompt_tokens": answer.prompt_tokens,
                    "total_tokens": answer.prompt_tokens,
                },
                "results": ranked,
            }
        )

    prompts = [encode_prompt(each) for each in (request.query, *request.documents)]
    _run(serving, exchange, name, prompts, body)


def score(serving: Serving, exchange: Exchange) -> None:
    """Say how near texts are: one to one, or one to many."""
    content_type = exchange.headers.get(b"content-type", b"")
    request = read_body(exchange.body, content_type, requests.SCORE)
    serving.check_model(request.model)
    left = [request.text_1] if isinstance(request.text_1, str) else request.text_1
    right = [request.text_2] if isinstance(request.text_2, str) else request.text_2
    if not left or not right or (len(left) > 1 and len(left) != len(right)):
        raise bad_request("Input lengths must be either 1:1, 1:N or N:N", "text_1")
    name = f"score-{request_id(exchange)}"
    partners = list(range(len(left))) if len(left) > 1 else [0] * len(right)

    def body(answer: CollectedAnswer, results: list[Result]) -> bytes:
        scores = _scores(results, partners, first=len(left))
        return msgspec.json.encode(
            {
                "id": name,
                "object": "list",
                "created": now_unix_s(),
                "model": serving.name,
                "data": [
                    {"index": at, "object": "score", "score": value}
                    for at, value in enumerate(scores)
                ],
                "usage": usage(answer.prompt_tokens, 0),
            }
        )

    _run(serving, exchange, name, [encode_prompt(each) for each in (*left, *right)], body)


def _run(
    serving: Serving,
    exchange: Exchange,
    name: str,
    prompts: list[list[int]],
    body: Callable[[CollectedAnswer, list[Result]], bytes],
) -> None:
    for ids in prompts:
        serving.room_for(ids, None, "input_tokens")
    answer = CollectedAnswer(serving.engine, exchange, name, body)
    answer.start(serving.runs(prompts, _POOLING, answer))


def _scores(results: list[Result], partners: list[int], *, first: int = 1) -> list[float]:
    """Return the cosine of each result from `first` on with the result at its partner's place."""
    vectors = [_vector(tuple(result.run.scheduled.ids)) for result in results]
    return [
        sum(a * b for a, b in zip(vectors[partner], vector, strict=True))
        for partner, vector in zip(partners, vectors[first:], strict=True)
    ]


@lru_cache(maxsize=1024)
def _vector(ids: tuple[int, ...]) -> tuple[float, ...]:
    """Return the unit vector of a text from its tokens and, more faintly, its pairs of tokens."""
    values = [0.0] * DIMENSIONS
    values[0] = 1e-6  # a text without tokens still has a direction
    for token in ids:
        if token != BOS:
            _add(values, token, 1.0)
    for first, second in pairwise(ids):
        _add(values, first * 65599 + second, 0.5)
    norm = math.sqrt(sum(value * value for value in values))
    return tuple(value / norm for value in values)


def _add(values: list[float], key: int, weight: float) -> None:
    state = (key * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF
    for _ in range(_SPOTS_PER_TOKEN):
        state = (state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        values[(state >> 33) % DIMENSIONS] += weight if state >> 63 else -weight
