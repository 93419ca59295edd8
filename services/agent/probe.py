"""Questions to an engine: is it up, can it produce a token, how loaded is it, what does it serve.

The one-token generation is the probe that tells the truth. Every question has a deadline, and an
answer that cannot be understood counts as none.
"""

import math
import re
from typing import Final

import msgspec

from services.agent.engine_http import Response, request
from shared.models.deployment import DeploymentSpec, EngineKind

PROBE_TOKEN: Final = 5
"""A token id that every vocabulary has."""
METRICS_DEADLINE_S: Final = 1.0
MODELS_DEADLINE_S: Final = 5.0

_SAMPLE: Final = re.compile(
    r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc"
    r"|generation_tokens_total|prompt_tokens_total)(?:\{[^}]*\})? ([^ \n]+)",
    re.MULTILINE,
)


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's own counts."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    """0 to 1."""
    progress: float = 0.0
    """Tokens read and produced since the engine's start."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where an engine answers. The key is not shown by repr, since it is a field of no log line."""

    url: str
    api_key: str

    def __repr__(self) -> str:
        return f"Endpoint({self.url})"


class _Card(msgspec.Struct, frozen=True):
    id: str = ""
    max_model_len: int | None = None


class _Cards(msgspec.Struct, frozen=True):
    data: list[_Card] = msgspec.field(default_factory=list[_Card])


async def is_up(endpoint: Endpoint, deadline_s: float) -> bool:
    """Tell whether the API server answers at all: the cheap question while an engine starts."""
    try:
        answer = await request(f"{endpoint.url}/health", deadline_s=deadline_s)
    except OSError:
        return False
    return answer.status == 200


async def complaint(endpoint: Endpoint, spec: DeploymentSpec, deadline_s: float) -> str | None:
    """Have the engine do its real work once; return None if it did, else what went wrong.

    An external server is only asked for its models: its tokens may cost money.
    """
    try:
        if spec.engine.kind is EngineKind.EXTERNAL:
            return _judge(await _get(endpoint, "/v1/models", deadline_s), "data")
        if spec.engine.runner != "pooling":
            content: dict[str, object] = {
                "model": spec.name,
                "prompt": [PROBE_TOKEN],
                "max_tokens": 1,
            }
            return _judge(await _post(endpoint, "/v1/completions", content, deadline_s), "choices")
        content = {"model": spec.name, "input": [PROBE_TOKEN]}
        answer = await _post(endpoint, "/v1/embeddings", content, deadline_s)
        if answer.status == 404:  # classifiers and scorers pool, but do not embed
            answer = await _post(endpoint, "/pooling", content, deadline_s)
        return _judge(answer, "data")
    except TimeoutError:
        return f"no answer within {deadline_s:g} s"
    except OSError as error:
        return f"no answer: {error.strerror or error}"


async def read_load(endpoint: Endpoint) -> Load | None:
    """Read the engine's metrics; None when it does not answer in time."""
    try:
        answer = await request(f"{endpoint.url}/metrics", deadline_s=METRICS_DEADLINE_S)
    except OSError:
        return None
    return parse_load(answer.body.decode(errors="replace")) if answer.status == 200 else None


async def read_context_tokens(endpoint: Endpoint) -> int:
    """Read the context length that the engine reports; 0 when it reports none."""
    try:
        answer = await _get(endpoint, "/v1/models", MODELS_DEADLINE_S)
        cards = msgspec.json.decode(answer.body, type=_Cards)
    except (OSError, msgspec.MsgspecError):
        return 0
    return max((card.max_model_len or 0 for card in cards.data), default=0)


def parse_load(text: str) -> Load:
    """Parse Prometheus text; samples of several engine cores add up (KV use: the fullest)."""
    sums: dict[str, float] = {}
    kv_usage = 0.0
    for name, value in _SAMPLE.findall(text):
        try:
            number = float(value)
        except ValueError:
            continue
        if not math.isfinite(number):
            continue
        if name == "kv_cache_usage_perc":
            kv_usage = max(kv_usage, number)
        sums[name] = sums.get(name, 0.0) + number
    return Load(
        running=int(sums.get("num_requests_running", 0)),
        waiting=int(sums.get("num_requests_waiting", 0)),
        kv_usage=kv_usage,
        progress=sums.get("generation_tokens_total", 0) + sums.get("prompt_tokens_total", 0),
    )


async def _get(endpoint: Endpoint, path: str, deadline_s: float) -> Response:
    return await request(endpoint.url + path, deadline_s=deadline_s, api_key=endpoint.api_key)


async def _post(endpoint: Endpoint, path: str, content: object, deadline_s: float) -> Response:
    return await request(
        endpoint.url + path, deadline_s=deadline_s, api_key=endpoint.api_key, content=content
    )


def _judge(answer: Response, wanted: str) -> str | None:
    if answer.status in {401, 403}:
        return f"it refused the API key (HTTP {answer.status})"
    if answer.status != 200:
        return f"HTTP {answer.status}: {answer.body[:120].decode(errors='replace')}"
    try:
        content = msgspec.json.decode(answer.body, type=dict[str, object])
    except msgspec.MsgspecError:
        return "the answer is not a JSON object"
    return None if wanted in content else f"the answer has no {wanted!r}"
