"""Reading a client's request: what the proxy must know of it, and nothing more.

The body is decoded once, into the few fields that routing needs; all others pass through unread,
byte for byte. Only a path-addressed call is rewritten: its model is set, everything else stays.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec

from services.proxy import refusals
from services.proxy.continuation.plan import COMPLETIONS, PATHS
from services.proxy.continuation.rules import armable
from services.proxy.continuation.tape import Options
from services.proxy.cost import prompt_tokens
from services.proxy.policies.digests import FIRST_CUT_BYTES, NO_PREFIX, Prefix, prefix_of
from services.proxy.refusals import Refusal
from shared.ids import new_request_id

NO_TOOLS: Final = frozenset({b"", b"null", b"[]"})
REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:@+=/-]{0,127}")


class RefusedError(Exception):
    """The request is refused; `refusal` says how."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Peek(msgspec.Struct):
    """The fields of a body that matter here. Wrong types are the engine's to refuse."""

    model: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    stream: Any = None
    stop: Any = None
    include_stop_str_in_output: Any = None
    return_token_ids: Any = None
    logprobs: Any = None
    echo: Any = None
    tool_choice: Any = None
    tools: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    messages: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    prompt: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    input: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class Inbound(msgspec.Struct):
    """A request that is ready to be sent to a replica."""

    path: bytes
    body: bytes
    request_id: bytes
    prompt_tokens: int
    prefix: Prefix
    client_limit_tokens: int | None
    choices: int = 1
    tape: Options | None = None
    """How to keep a tape of its stream; None where that stream could not go on elsewhere."""
    output_tokens: int = 0
    """Expected; set once the model is known."""


_PEEK: Final = msgspec.json.Decoder(Peek)
_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def request_id_of(given: bytes) -> bytes:
    """Keep the client's request id if it is a sane one, else make one."""
    if given and REQUEST_ID.fullmatch(given):
        return given
    return new_request_id().encode()


def peek(body: bytes) -> Peek:
    """Decode what matters of a body; raises RefusedError where it is not a JSON object."""
    try:
        return _PEEK.decode(body)
    except msgspec.ValidationError:
        raise RefusedError(
            refusals.bad_field("body", "the request body must be a JSON object")
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(refusals.not_json(str(error))) from None


def named_model(given: Peek) -> str:
    """Return the model that a body names; raises RefusedError where it names none."""
    model = given.model
    if isinstance(model, str) and model:
        return model
    raise RefusedError(
        refusals.bad_field("model", "`model` is missing or not a string: GET /v1/models lists some")
    )


def inbound(
    path: bytes, body: bytes, request_id: bytes, given: Peek, *, taped: bool = True
) -> Inbound:
    """Put together what is sent to a replica; without `taped`, nobody will keep a tape of it."""
    limit = None
    for bound in (given.max_completion_tokens, given.max_tokens, given.max_output_tokens):
        if bound is not None and (limit := _whole(bound)) is not None:
            break
    prompt = bytes(given.messages) or bytes(given.prompt) or bytes(given.input)
    return Inbound(
        path=path,
        body=body,
        request_id=request_id,
        prompt_tokens=prompt_tokens(prompt),
        prefix=NO_PREFIX
        if len(prompt) < FIRST_CUT_BYTES
        else prefix_of(prompt, bytes(given.tools)),
        client_limit_tokens=limit,
        choices=1 if given.n is None else _whole(given.n) or 1,
        tape=_tape(path, given) if taped and given.stream is True else None,
    )


def _tape(path: bytes, given: Peek) -> Options | None:
    tools = bytes(given.tools) not in NO_TOOLS
    if path not in PATHS or not armable(
        choices=given.n, echo=given.echo, tools=tools, tool_choice=given.tool_choice
    ):
        return None
    return Options.of(
        stop=given.stop,
        shows_stop=bool(given.include_stop_str_in_output),
        wants_ids=bool(given.return_token_ids),
        offsets=path == COMPLETIONS and given.logprobs is not None,
    )


def with_model(body: bytes, model: str) -> bytes:
    """Set the model of a body; every other field keeps its bytes."""
    try:
        fields = _FIELDS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(refusals.not_json(str(error))) from None
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)


def text_request(model: str, body: bytes, query: bytes) -> bytes:
    """Make a streamed chat request of a plain-text prompt and its query parameters."""
    try:
        prompt = body.decode()
    except UnicodeDecodeError:
        raise RefusedError(
            refusals.bad_field("body", "the text/plain body must be UTF-8")
        ) from None
    if not prompt.strip():
        raise RefusedError(
            refusals.bad_field("body", "the text/plain body is empty: send the prompt in it")
        )
    request: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
    }
    stops: list[str] = []
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name == "stop":
            stops.append(value)
            continue
        kind = _TEXT_PARAMETERS.get(name)
        if kind is None:
            allowed = ", ".join([*_TEXT_PARAMETERS, "stop"])
            raise RefusedError(
                refusals.bad_field(name[:64], f"unknown query parameter; there are: {allowed}")
            )
        try:
            number = kind(value)
            if not math.isfinite(number):
                raise ValueError(value)  # noqa: TRY301 - JSON has no such numbers: as if no number
            request[name] = number
        except (ValueError, OverflowError):
            wanted = "a whole number" if kind is int else "a number"
            raise RefusedError(
                refusals.bad_field(name, f"{name}={value[:40]!r}: give {wanted}")
            ) from None
    if stops:
        request["stop"] = stops
    return msgspec.json.encode(request)


_TEXT_PARAMETERS: Final[Mapping[str, type[int] | type[float]]] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "seed": int,
}


def _whole(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None
