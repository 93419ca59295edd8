"""What the API rooms share: the model's name and limits, runs made from requests, and usage."""

from collections.abc import Sequence
from random import Random
from time import time
from uuid import uuid4

import msgspec

from services.simengine import text
from services.simengine.engine import Engine, Run, RunSettings, Sink
from services.simengine.refusals import RefusalError, bad_request, unknown_model
from services.simengine.requests import Message, Prompt, Sampling, Stop, text_of
from services.simengine.scheduler import Sequence as Scheduled
from services.simengine.wire import Exchange

VERSION = "0.32.0"
MAX_LOGPROBS = 20


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What this engine calls itself. `names[0]` is in every answer; all names are accepted."""

    names: tuple[str, ...]
    root: str
    max_model_len: int
    pooling: bool
    fingerprint: str | None
    mean_answer_tokens: int
    created_s: int


class Serving:
    """The engine as the API rooms see it."""

    def __init__(self, identity: Identity, engine: Engine, *, noise: Random) -> None:
        self.identity = identity
        self.engine = engine
        self._noise = noise

    @property
    def name(self) -> str:
        """The model name that answers carry."""
        return self.identity.names[0]

    def check_model(self, model: str | None) -> None:
        """Refuse a model that is not served; no model at all means the one there is."""
        if model and model not in self.identity.names:
            raise unknown_model(model)

    def settings_of(self, request: Sampling, *, max_tokens: int) -> RunSettings:
        """Check the sampling fields of an OpenAI request and turn them into a run's settings."""
        temperature = 1.0 if request.temperature is None else request.temperature
        check_sampling(temperature, request.top_p)
        if request.top_k is not None and request.top_k < -1:
            raise bad_request(
                f"top_k must be 0 or -1 (disable), or at least 1, got {request.top_k}.", "top_k"
            )
        count = request.n if request.n is not None else 1
        if count < 1:
            raise bad_request(f"n must be at least 1, got {count}.", "n")
        if count > 1 and temperature == 0:
            raise bad_request(f"n must be 1 when using greedy sampling, got {count}.", "n")
        if max_tokens < 1:
            raise bad_request(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens")
        if not 0 <= request.min_tokens <= max_tokens:
            message = (
                f"min_tokens must be between 0 and max_tokens={max_tokens}, "
                f"got {request.min_tokens}."
            )
            raise bad_request(message, "min_tokens")
        return RunSettings(
            max_tokens=max_tokens,
            min_tokens=request.min_tokens,
            ignore_eos=request.ignore_eos,
            stop_token_ids=frozenset(request.stop_token_ids or ()),
            stops=stops_of(request.stop),
            include_stop=request.include_stop_str_in_output,
            skip_special=request.skip_special_tokens,
            greedy=temperature == 0,
            seed=request.seed,
        )

    def room_for(self, prompt_ids: Sequence[int], wanted: int | None, param: str) -> int:
        """Return how many tokens may be generated; raises the 400 of a context too long."""
        limit = self.identity.max_model_len
        length = len(prompt_ids)
        if wanted is not None and wanted > limit:
            message = (
                f"max_tokens={wanted} cannot be greater than max_model_len={limit}. "
                "Please request fewer output tokens."
            )
            raise bad_request(message, "max_tokens")
        if length >= limit or (wanted is not None and length + wanted > limit):
            asked = 1 if wanted is None else wanted
            message = (
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{asked} output tokens and your prompt contains at least {length} input tokens, "
                f"for a total of at least {length + asked} tokens. Please reduce the length of "
                "the input prompt or the number of requested output tokens."
            )
            raise bad_request(message, param)
        return limit - length if wanted is None else wanted

    def runs(
        self,
        prompts: Sequence[list[int]],
        settings: RunSettings,
        sink: Sink,
        *,
        copies: int = 1,
        salt: str = "",
    ) -> list[Run]:
        """Make the runs of a request: `copies` of each prompt, numbered in that order."""
        now_s = self.engine.scheduler_now_s()
        return [
            Run(
                at * copies + copy,
                Scheduled(prompt, arrived_s=now_s, salt=salt),
                settings,
                sink,
                mean_answer_tokens=self.identity.mean_answer_tokens,
                noise=self._noise,
            )
            for at, prompt in enumerate(prompts)
            for copy in range(copies)
        ]


def check_sampling(temperature: float, top_p: float | None) -> None:
    """Refuse a temperature or top_p that means nothing."""
    if temperature < 0:
        message = f"temperature must be non-negative, got {temperature}."
        raise bad_request(message, "temperature")
    if top_p is not None and not 0 < top_p <= 1:
        raise bad_request(f"top_p must be in (0, 1], got {top_p}.", "top_p")


def stops_of(stop: Stop) -> tuple[str, ...]:
    """Return the stop strings; empty ones are refused."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in stops:
        raise bad_request("stop cannot contain an empty string.", "stop")
    return stops


def prompts_of(prompt: Prompt, *, special: bool = True) -> list[list[int]]:
    """Return the token ids of each prompt in any of the four forms."""
    encode = text.encode_prompt if special else text.encode
    if isinstance(prompt, str):
        prompts = [encode(prompt)]
    elif all(isinstance(item, int) for item in prompt):
        prompts = [[item for item in prompt if isinstance(item, int)]]
    else:
        prompts = [encode(item) if isinstance(item, str) else _ids(item) for item in prompt]
    if not prompt or not all(prompts):
        raise bad_request(
            "Either prompt or prompt_embeds must be provided and non-empty.", "prompt"
        )
    for ids in prompts:
        for token in (min(ids), max(ids)):
            if not 0 <= token < text.SIZE:
                raise bad_request(f"Token id {token} is out of vocabulary", "prompt")
    return prompts


def _ids(item: int | list[int]) -> list[int]:
    if isinstance(item, int):
        message = "prompt: a list holds either texts, token ids, or lists of token ids, not a mix"
        raise RefusalError(400, "Bad Request", message, "body.prompt")
    return item


def chat_ids(messages: Sequence[Message], *, open_answer: bool = True) -> list[int]:
    """Return the ids of a conversation in the chat template."""
    return text.encode_chat(
        [(message.role, text_of(message.content)) for message in messages],
        open_answer=open_answer,
    )


def counts(prompt_tokens: int, completion_tokens: int) -> dict[str, object]:
    """Return OpenAI's usage object as streams have it: without what has no value."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, object]:
    """Return OpenAI's usage object as whole answers have it."""
    return {
        **counts(prompt_tokens, completion_tokens),
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }


def request_id(exchange: Exchange, wanted: str | None = None) -> str:
    """Return the id that the answer's `id` ends in: the client's own, or a fresh one."""
    header = exchange.headers.get(b"x-request-id")
    if header:
        return header.decode("latin-1")
    return wanted or uuid4().hex


def now_unix_s() -> int:
    """Return the wall clock in whole seconds, as `created` wants it."""
    return int(time())
