"""POST /v1/messages and /v1/messages/count_tokens, in Anthropic's shapes."""

from collections.abc import Sequence

import msgspec

from services.simengine import requests
from services.simengine.answers import CollectedAnswer, Result, StreamedAnswer
from services.simengine.engine import Run, RunSettings
from services.simengine.refusals import RefusalError, bad_request, read_body
from services.simengine.requests import AnthropicRequest, text_of
from services.simengine.serving import Serving, check_sampling, request_id, stops_of
from services.simengine.text import encode_chat
from services.simengine.wire import Exchange


def messages(serving: Serving, exchange: Exchange) -> None:
    """Answer a conversation."""
    request = _read(serving, exchange)
    temperature = 1.0 if request.temperature is None else request.temperature
    check_sampling(temperature, request.top_p)
    if request.max_tokens is None:
        message = "Object missing required field `max_tokens`"
        raise RefusalError(400, "Bad Request", message, "body.max_tokens")
    if request.max_tokens < 1:
        message = f"max_tokens must be at least 1, got {request.max_tokens}."
        raise bad_request(message, "max_tokens")
    ids = _prompt(request)
    settings = RunSettings(
        max_tokens=serving.room_for(ids, request.max_tokens, "input_tokens"),
        stops=stops_of(request.stop_sequences),
        greedy=temperature == 0,
    )
    name = f"msg_{request_id(exchange)}"
    model = serving.name
    if request.stream:
        answer = MessagesStream(serving, exchange, name)
    else:

        def body(answer: CollectedAnswer, results: list[Result]) -> bytes:
            content = [{"type": "text", "text": results[0].text}]
            ending = _ending(results[0].finish, results[0].stop)
            used = {
                "input_tokens": answer.prompt_tokens,
                "output_tokens": answer.completion_tokens,
            }
            return msgspec.json.encode({**_message(name, model, content), **ending, "usage": used})

        answer = CollectedMessages(serving.engine, exchange, name, body)
    answer.start(serving.runs([ids], settings, answer))


def count_tokens(serving: Serving, exchange: Exchange) -> None:
    """Say how many tokens a conversation is."""
    request = _read(serving, exchange)
    exchange.reply(200, msgspec.json.encode({"input_tokens": len(_prompt(request))}))


class CollectedMessages(CollectedAnswer):
    """A whole message; a dead engine is told in Anthropic's shape."""

    def fail(self, error: RefusalError) -> None:
        """Answer with the error."""
        self.exchange.reply(error.status, msgspec.json.encode(error.anthropic_error()))


class MessagesStream(StreamedAnswer):
    """Named events from message_start to message_stop."""

    def __init__(self, serving: Serving, exchange: Exchange, name: str) -> None:
        super().__init__(serving.engine, exchange, name)
        self._model = serving.name
        self._begun = False

    def chunk(
        self, run: Run, ids: Sequence[int], shown: str, finish: str | None, stop: str | int | None
    ) -> bytes:
        """Return the delta, with the opening events first and the closing ones last."""
        del ids
        data = b""
        if not self._begun:
            self._begun = True
            opening = {
                **_message(self.name, self._model, []),
                "usage": {"input_tokens": run.scheduled.prompt_tokens, "output_tokens": 0},
            }
            block = {"type": "text", "text": ""}
            data = _event("message_start", {"message": opening}) + _event(
                "content_block_start", {"index": 0, "content_block": block}
            )
        if shown:
            delta = {"type": "text_delta", "text": shown}
            data += _event("content_block_delta", {"index": 0, "delta": delta})
        if finish is not None:
            used = {"input_tokens": run.scheduled.prompt_tokens, "output_tokens": run.produced}
            data += (
                _event("content_block_stop", {"index": 0})
                + _event("message_delta", {"delta": _ending(finish, stop), "usage": used})
                + _event("message_stop", {})
            )
        return data or b": \n\n"

    def closing(self) -> bytes:
        """Return nothing: the last event was the end."""
        return b""

    def failure(self, error: RefusalError) -> bytes:
        """Return Anthropic's error event."""
        return b"event: error\ndata: %b\n\n" % msgspec.json.encode(error.anthropic_error())


def _read(serving: Serving, exchange: Exchange) -> AnthropicRequest:
    content_type = exchange.headers.get(b"content-type", b"")
    request = read_body(exchange.body, content_type, requests.ANTHROPIC)
    serving.check_model(request.model)
    if not request.messages:
        raise RefusalError(400, "Bad Request", "messages must not be empty", "body.messages")
    return request


def _prompt(request: AnthropicRequest) -> list[int]:
    system = text_of(request.system)
    turns = [("system", system)] if system else []
    turns += [(message.role, text_of(message.content)) for message in request.messages]
    return encode_chat(turns)


def _message(name: str, model: str, content: Sequence[dict[str, str]]) -> dict[str, object]:
    return {
        "id": name,
        "type": "message",
        "role": "assistant",
        "content": content,
        "model": model,
        "stop_reason": None,
        "stop_sequence": None,
    }


def _ending(finish: str | None, stop: str | int | None) -> dict[str, object]:
    if finish == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _event(kind: str, fields: dict[str, object]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (
        kind.encode(),
        msgspec.json.encode({"type": kind, **fields}),
    )
