"""POST /v1/responses, streamed and not: text in, text out."""

from collections.abc import Sequence

import msgspec

from services.simengine import requests
from services.simengine.answers import CollectedAnswer, Result, StreamedAnswer
from services.simengine.engine import Run, RunSettings
from services.simengine.refusals import RefusalError, bad_request, read_body
from services.simengine.requests import ResponsesRequest, text_of
from services.simengine.serving import Serving, check_sampling, now_unix_s, request_id
from services.simengine.text import encode_chat
from services.simengine.wire import Exchange


def responses(serving: Serving, exchange: Exchange) -> None:
    """Answer a Responses request."""
    content_type = exchange.headers.get(b"content-type", b"")
    request = read_body(exchange.body, content_type, requests.RESPONSES)
    serving.check_model(request.model)
    temperature = 1.0 if request.temperature is None else request.temperature
    check_sampling(temperature, request.top_p)
    if request.max_output_tokens is not None and request.max_output_tokens < 1:
        message = f"max_output_tokens must be at least 1, got {request.max_output_tokens}."
        raise bad_request(message, "max_output_tokens")
    turns = [("system", request.instructions)] if request.instructions else []
    if isinstance(request.input, str):
        turns.append(("user", request.input))
    else:
        turns += [(item.role, text_of(item.content)) for item in request.input]
    ids = encode_chat(turns)
    settings = RunSettings(
        max_tokens=serving.room_for(ids, request.max_output_tokens, "input_tokens"),
        greedy=temperature == 0,
    )
    writer = _Writer(serving, request, request_id(exchange, request.request_id))
    answer = (
        ResponsesStream(serving, exchange, writer)
        if request.stream
        else CollectedAnswer(serving.engine, exchange, writer.name, writer.body)
    )
    answer.start(serving.runs([ids], settings, answer))


class _Writer:
    """Writes the response object in each of its states."""

    def __init__(self, serving: Serving, request: ResponsesRequest, suffix: str) -> None:
        self.name = f"resp_{suffix}"
        self.message_id = f"msg_{suffix}"
        self._request = request
        self._model = serving.name
        self._created_s = now_unix_s()

    def part(self, text: str) -> dict[str, object]:
        """Return the one content part."""
        return {"annotations": [], "text": text, "type": "output_text", "logprobs": None}

    def item(self, text: str | None, status: str) -> dict[str, object]:
        """Return the one output item; `text` None while it has no content part."""
        return {
            "id": self.message_id,
            "content": [] if text is None else [self.part(text)],
            "role": "assistant",
            "status": status,
            "type": "message",
        }

    def response(self, run: Run | None, text: str, finish: str | None) -> dict[str, object]:
        """Return the whole response object; `finish` None is in progress."""
        status = {None: "in_progress", "length": "incomplete"}.get(finish, "completed")
        tokens = None
        if run is not None:
            prompt = run.scheduled.prompt_tokens
            tokens = {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": run.scheduled.cached_tokens},
                "output_tokens": run.produced,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + run.produced,
            }
        return {
            "id": self.name,
            "created_at": self._created_s,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "instructions": self._request.instructions,
            "metadata": None,
            "model": self._model,
            "object": "response",
            "output": [] if finish is None else [self.item(text, "completed")],
            "parallel_tool_calls": True,
            "temperature": self._request.temperature,
            "tool_choice": "auto",
            "tools": [],
            "top_p": self._request.top_p,
            "background": False,
            "max_output_tokens": self._request.max_output_tokens,
            "status": status,
            "usage": tokens,
        }

    def body(self, _answer: CollectedAnswer, results: list[Result]) -> bytes:
        """Return the whole answer."""
        result = results[0]
        return msgspec.json.encode(self.response(result.run, result.text, result.finish))


class ResponsesStream(StreamedAnswer):
    """Named events with sequence numbers; there is no end mark."""

    def __init__(self, serving: Serving, exchange: Exchange, writer: _Writer) -> None:
        super().__init__(serving.engine, exchange, writer.name)
        self._writer = writer
        self._sequence = 0
        self._pieces: list[str] = []
        self._place: dict[str, object] = {
            "item_id": writer.message_id,
            "output_index": 0,
            "content_index": 0,
        }

    def chunk(
        self, run: Run, ids: Sequence[int], shown: str, finish: str | None, stop: str | int | None
    ) -> bytes:
        """Return the delta, with the opening events first and the closing ones last."""
        del ids, stop
        writer = self._writer
        data = b""
        if not self._sequence:
            opening = writer.response(None, "", None)
            data = (
                self._event("response.created", {"response": opening})
                + self._event("response.in_progress", {"response": opening})
                + self._event(
                    "response.output_item.added",
                    {"output_index": 0, "item": writer.item(None, "in_progress")},
                )
                + self._event(
                    "response.content_part.added", {**self._place, "part": writer.part("")}
                )
            )
        self._pieces.append(shown)
        data += self._event(
            "response.output_text.delta", {**self._place, "delta": shown, "logprobs": []}
        )
        if finish is None:
            return data
        text = "".join(self._pieces)
        return (
            data
            + self._event(
                "response.output_text.done", {**self._place, "text": text, "logprobs": []}
            )
            + self._event("response.content_part.done", {**self._place, "part": writer.part(text)})
            + self._event(
                "response.output_item.done",
                {"output_index": 0, "item": writer.item(text, "completed")},
            )
            + self._event("response.completed", {"response": writer.response(run, text, finish)})
        )

    def closing(self) -> bytes:
        """Return nothing: the last event was the end."""
        return b""

    def failure(self, error: RefusalError) -> bytes:
        """Return the error event and the end mark, as vLLM's generic handler writes them."""
        return b"data: " + error.openai_body() + b"\n\ndata: [DONE]\n\n"

    def _event(self, kind: str, fields: dict[str, object]) -> bytes:
        body = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(body))
