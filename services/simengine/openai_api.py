"""POST /v1/chat/completions and /v1/completions, streamed and not."""

from collections.abc import Sequence
from typing import ClassVar, Final

import msgspec

from services.simengine import requests
from services.simengine.answers import CollectedAnswer, Result, StreamedAnswer
from services.simengine.engine import Run
from services.simengine.logprobs import chat_logprobs, completion_logprobs, text_chars
from services.simengine.refusals import RefusalError, bad_request, read_body
from services.simengine.requests import ChatRequest, CompletionRequest, Sampling
from services.simengine.serving import (
    MAX_LOGPROBS,
    Serving,
    chat_ids,
    counts,
    now_unix_s,
    prompts_of,
    request_id,
    usage,
)
from services.simengine.text import decode
from services.simengine.wire import Exchange

DONE: Final = b"data: [DONE]\n\n"
_json = msgspec.json.encode


def chat(serving: Serving, exchange: Exchange) -> None:
    """Answer a conversation."""
    request = read_body(exchange.body, exchange.headers.get(b"content-type", b""), requests.CHAT)
    serving.check_model(request.model)
    _check_chat(request)
    ids = chat_ids(request.messages, open_answer=request.add_generation_prompt)
    wanted = request.max_completion_tokens
    wanted = request.max_tokens if wanted is None else wanted
    settings = serving.settings_of(
        request, max_tokens=serving.room_for(ids, wanted, "input_tokens")
    )
    copies = request.n or 1
    name = f"chatcmpl-{request_id(exchange, request.request_id)}"
    answer = (
        ChatStream(serving, exchange, name, request)
        if request.stream
        else CollectedAnswer(serving.engine, exchange, name, ChatBody(serving, request))
    )
    salt = request.cache_salt or ""
    runs = serving.runs([ids], settings, answer, copies=copies, salt=salt)
    answer.start(runs, copies=copies)


def completions(serving: Serving, exchange: Exchange) -> None:
    """Complete one or several prompts, given as text or as token ids."""
    content_type = exchange.headers.get(b"content-type", b"")
    request = read_body(exchange.body, content_type, requests.COMPLETION)
    serving.check_model(request.model)
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
        message = f"logprobs must be between 0 and {MAX_LOGPROBS}, got {request.logprobs}."
        raise bad_request(message, "logprobs")
    _check_stream_options(request)
    prompts = prompts_of(request.prompt, special=request.add_special_tokens)
    param = "input_text" if isinstance(request.prompt, str) else "input_tokens"
    rooms = [serving.room_for(ids, request.max_tokens, param) for ids in prompts]
    settings = serving.settings_of(request, max_tokens=min(rooms))
    copies = request.n or 1
    name = f"cmpl-{request_id(exchange, request.request_id)}"
    answer = (
        CompletionStream(serving, exchange, name, request)
        if request.stream
        else CollectedAnswer(serving.engine, exchange, name, CompletionBody(serving, request))
    )
    salt = request.cache_salt or ""
    runs = serving.runs(prompts, settings, answer, copies=copies, salt=salt)
    answer.start(runs, copies=copies)


class OpenAIStream(StreamedAnswer):
    """What the streams of both routes share: the head of each event, the end and the failure."""

    object_name = ""
    running_details: ClassVar[dict[str, object]] = {}
    """What vLLM adds to the usage of each chunk."""

    def __init__(self, serving: Serving, exchange: Exchange, name: str, request: Sampling) -> None:
        super().__init__(serving.engine, exchange, name)
        options = request.stream_options
        self._usage = options is not None and options.include_usage
        self._running_usage = options is not None and options.continuous_usage_stats
        self._with_ids = bool(request.return_token_ids)
        self._fingerprint = serving.identity.fingerprint
        identity = {
            "id": name,
            "object": self.object_name,
            "created": now_unix_s(),
            "model": serving.name,
        }
        self._identity = _json(identity)[:-1]
        self._head = b"data: " + self._identity + b',"choices":[{"index":'
        self._begun: set[int] = set()

    def closing(self) -> bytes:
        """Return the usage event, if asked for, and the end mark."""
        if not self._usage:
            return DONE
        total = counts(self.prompt_tokens, self.completion_tokens)
        return (
            b"data: " + self._identity + b',"choices":[],"system_fingerprint":'
            b"%b,"
            b'"usage":%b}\n\n' % (_json(self._fingerprint), _json(total)) + DONE
        )

    def failure(self, error: RefusalError) -> bytes:
        """Return the error event; the end mark follows, and is no proof of success."""
        return b"data: " + error.openai_body() + b"\n\n" + DONE

    def _running(self, run: Run, produced: int | None = None) -> bytes:
        if not self._running_usage:
            return b""
        told = counts(run.scheduled.prompt_tokens, run.produced if produced is None else produced)
        return b',"usage":' + _json({**told, **self.running_details})

    def _final(self) -> bytes:
        if self._usage:
            return b""
        return b',"system_fingerprint":' + _json(self._fingerprint)


class ChatStream(OpenAIStream):
    """Chunks of a chat answer: the role first, then one delta per token."""

    object_name = "chat.completion.chunk"
    running_details: ClassVar[dict[str, object]] = {"completion_tokens_details": None}

    def __init__(
        self, serving: Serving, exchange: Exchange, name: str, request: ChatRequest
    ) -> None:
        super().__init__(serving, exchange, name, request)
        self._top = (request.top_logprobs or 0) if request.logprobs else None

    def chunk(
        self, run: Run, ids: Sequence[int], shown: str, finish: str | None, stop: str | int | None
    ) -> bytes:
        """Return the delta, with the role chunk before a choice's first."""
        logprobs = b"null" if self._top is None else _json(chat_logprobs(ids, self._top))
        data = b'%b%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":' % (
            self._head,
            run.index,
            _json(shown),
            logprobs,
        )
        token_ids = _json(ids) if self._with_ids else b"null"
        if finish is None:
            data += b'null,"token_ids":%b}]%b}\n\n' % (token_ids, self._running(run))
        else:
            data += b'%b,"stop_reason":%b,"token_ids":%b}]%b%b}\n\n' % (
                _json(finish),
                _json(stop),
                token_ids,
                self._final(),
                self._running(run),
            )
        if run.index in self._begun:
            return data
        self._begun.add(run.index)
        return self._role_chunk(run) + data

    def _role_chunk(self, run: Run) -> bytes:
        prompt = run.scheduled.ids[: run.scheduled.prompt_tokens]
        return (
            b'%b%d,"delta":{"role":"assistant","content":""},"logprobs":null,'
            b'"finish_reason":null}],"prompt_token_ids":%b,"prompt_text":null%b}\n\n'
            % (
                self._head,
                run.index,
                _json(prompt) if self._with_ids else b"null",
                self._running(run, 0),
            )
        )


class CompletionStream(OpenAIStream):
    """Chunks of a completion; the first carries the prompt's ids, or its echo."""

    object_name = "text_completion"

    def __init__(
        self, serving: Serving, exchange: Exchange, name: str, request: CompletionRequest
    ) -> None:
        super().__init__(serving, exchange, name, request)
        self._top = request.logprobs
        # As in vLLM, asking for token ids silently drops the echo.
        self._echo = bool(request.echo) and not self._with_ids
        self._offsets: dict[int, int] = {}

    def chunk(
        self, run: Run, ids: Sequence[int], shown: str, finish: str | None, stop: str | int | None
    ) -> bytes:
        """Return the event for the tokens `ids`."""
        prompt_ids = b"null"
        if run.index not in self._begun:
            self._begun.add(run.index)
            prompt = run.scheduled.ids[: run.scheduled.prompt_tokens]
            if self._with_ids:
                prompt_ids = _json(prompt)
            if self._echo:
                shown = decode(prompt) + shown
        logprobs = b"null"
        if self._top is not None:
            offset = self._offsets.get(run.index, 0)
            logprobs = _json(completion_logprobs(ids, self._top, offset))
            self._offsets[run.index] = offset + text_chars(ids)
        return (
            b'%b%d,"text":%b,"logprobs":%b,"finish_reason":%b,"stop_reason":%b,'
            b'"prompt_token_ids":%b,"token_ids":%b}]%b%b}\n\n'
            % (
                self._head,
                run.index,
                _json(shown),
                logprobs,
                _json(finish),
                _json(stop),
                prompt_ids,
                _json(ids) if self._with_ids else b"null",
                b"" if finish is None else self._final(),
                self._running(run),
            )
        )


class _Body:
    """What the whole answers of both routes share."""

    def __init__(self, serving: Serving, request: Sampling) -> None:
        self._serving = serving
        self._with_ids = bool(request.return_token_ids)
        self._created_s = now_unix_s()

    def _envelope(
        self, answer: CollectedAnswer, kind: str, choices: list[dict[str, object]]
    ) -> dict[str, object]:
        return {
            "id": answer.name,
            "object": kind,
            "created": self._created_s,
            "model": self._serving.name,
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": self._serving.identity.fingerprint,
            "usage": usage(answer.prompt_tokens, answer.completion_tokens),
            "kv_transfer_params": None,
        }


class ChatBody(_Body):
    """Writes a whole chat answer."""

    def __init__(self, serving: Serving, request: ChatRequest) -> None:
        super().__init__(serving, request)
        self._top = (request.top_logprobs or 0) if request.logprobs else None

    def __call__(self, answer: CollectedAnswer, results: list[Result]) -> bytes:
        """Return the body."""
        choices: list[dict[str, object]] = [
            {
                "index": at,
                "message": {
                    "role": "assistant",
                    "content": result.text,
                    "refusal": None,
                    "annotations": None,
                    "audio": None,
                    "function_call": None,
                    "tool_calls": [],
                    "reasoning": None,
                },
                "logprobs": None if self._top is None else chat_logprobs(result.ids, self._top),
                "finish_reason": result.finish,
                "stop_reason": result.stop,
                "token_ids": result.ids if self._with_ids else None,
            }
            for at, result in enumerate(results)
        ]
        body = self._envelope(answer, "chat.completion", choices)
        scheduled = results[0].run.scheduled
        body["prompt_logprobs"] = None
        body["prompt_token_ids"] = (
            scheduled.ids[: scheduled.prompt_tokens] if self._with_ids else None
        )
        return _json(body)


class CompletionBody(_Body):
    """Writes a whole completion."""

    def __init__(self, serving: Serving, request: CompletionRequest) -> None:
        super().__init__(serving, request)
        self._top = request.logprobs
        self._echo = bool(request.echo) and not self._with_ids

    def __call__(self, answer: CollectedAnswer, results: list[Result]) -> bytes:
        """Return the body."""
        choices: list[dict[str, object]] = []
        for at, result in enumerate(results):
            prompt = result.run.scheduled.ids[: result.run.scheduled.prompt_tokens]
            shown = (decode(prompt) if self._echo else "") + result.text
            logprobs = None
            if self._top is not None:
                logprobs = completion_logprobs(result.ids, self._top, len(shown) - len(result.text))
            choices.append(
                {
                    "index": at,
                    "text": shown,
                    "logprobs": logprobs,
                    "finish_reason": result.finish,
                    "stop_reason": result.stop,
                    "token_ids": result.ids if self._with_ids else None,
                    "prompt_logprobs": None,
                    "prompt_token_ids": prompt if self._with_ids else None,
                }
            )
        return _json(self._envelope(answer, "text_completion", choices))


def _check_chat(request: ChatRequest) -> None:
    _check_stream_options(request)
    if not request.messages:
        raise RefusalError(400, "Bad Request", "messages must not be empty", "body.messages")
    for message in request.messages:
        if isinstance(message.content, list) and any(
            part.type not in {"text", "input_text", "output_text"} for part in message.content
        ):
            raise bad_request("At most 0 image(s) may be provided in one prompt.", "messages")
    top = request.top_logprobs or 0
    if not 0 <= top <= MAX_LOGPROBS:
        message = f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {top}."
        raise bad_request(message, "top_logprobs")
    if top and not request.logprobs:
        message = "when using `top_logprobs`, `logprobs` must be set to true."
        raise bad_request(message, "top_logprobs")
    if request.tools and request.tool_choice != "none":
        message = (
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
        )
        raise bad_request(message, "tool_choice")


def _check_stream_options(request: Sampling) -> None:
    if request.stream_options is not None and not request.stream:
        message = "Stream options can only be defined when `stream=True`."
        raise RefusalError(400, "Bad Request", message, "body.stream_options")
