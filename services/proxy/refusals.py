"""What a client is told when the proxy itself answers: OpenAI's error shape, with a remedy.

A refusal is a value; `body` gives it in the dialect of the route (Anthropic's shape for
`/v1/messages`).
"""

from collections.abc import Sequence
from enum import Enum
from typing import Final

import msgspec


class Dialect(Enum):
    """Whose error shape a route speaks."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """One error answer."""

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None
    allow: str | None = None
    """For 405: the method that is allowed."""

    def body(self, dialect: Dialect = Dialect.OPENAI) -> bytes:
        """Encode the error."""
        if dialect is Dialect.ANTHROPIC:
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
            return msgspec.json.encode(
                {"type": "error", "error": {"type": kind, "message": self.message}}
            )
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def headers(self, request_id: bytes, body: bytes) -> list[tuple[bytes, bytes]]:
        """Give the headers that go with `body`."""
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", request_id),
        ]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after_s))
        if self.allow is not None:
            headers.append((b"allow", self.allow.encode()))
        return headers

    def event(self, dialect: Dialect = Dialect.OPENAI) -> bytes:
        """Encode the error as the last events of a stream that has begun."""
        if dialect is Dialect.ANTHROPIC:
            return b"event: error\ndata: " + self.body(dialect) + b"\n\n"
        return b"data: " + self.body(dialect) + b"\n\ndata: [DONE]\n\n"


_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def not_json(detail: str) -> Refusal:
    """400: the body does not parse."""
    return Refusal(
        status=400,
        message=f"the request body is not valid JSON: {detail}",
        code="invalid_json",
    )


def bad_field(param: str, message: str) -> Refusal:
    """400: a field is missing or of the wrong type."""
    return Refusal(status=400, message=message, code="invalid_field", param=param)


def wrong_content_type(given: str, wanted: str) -> Refusal:
    """415: this route takes another content type."""
    shown = repr(given[:80]) if given else "none"
    return Refusal(
        status=415,
        message=f"content-type is {shown}: send {wanted}",
        code="unsupported_media_type",
        param="content-type",
    )


def body_too_large(limit_bytes: int) -> Refusal:
    """413: the body is over the limit."""
    return Refusal(
        status=413,
        message=f"the request body is larger than {limit_bytes} bytes: send less",
        code="body_too_large",
    )


def body_too_slow(limit_s: float) -> Refusal:
    """408: the body did not arrive in time."""
    return Refusal(
        status=408,
        message=f"the request body did not arrive within {limit_s:g} s: send it faster",
        code="body_timeout",
    )


def wrong_method(given: str, allowed: str) -> Refusal:
    """405: the route exists, the method does not."""
    return Refusal(
        status=405,
        message=f"this route takes {allowed}, not {given[:16]}",
        code="method_not_allowed",
        allow=allowed,
    )


def unknown_route(path: str) -> Refusal:
    """404: no such route."""
    return Refusal(
        status=404,
        message=f"there is no route {path[:120]!r}: /schema/openapi.json lists those that are",
        code="route_not_found",
    )


def unknown_model(name: str, known: Sequence[str]) -> Refusal:
    """404: no such model; the first ten that exist are named."""
    shown = name if len(name) <= 128 else name[:128] + "…"
    have = ", ".join(known[:10]) or "none yet"
    more = f" and {len(known) - 10} more (GET /v1/models)" if len(known) > 10 else ""
    return Refusal(
        status=404,
        message=f"the model {shown!r} does not exist; models here: {have}{more}",
        code="model_not_found",
        param="model",
    )


def unserved_route(model: str, path: str) -> Refusal:
    """404: the engine of this model has no such route."""
    return Refusal(
        status=404,
        message=f"the model {model!r} does not serve {path}: it is of another kind "
        "(generation or embedding)",
        code="route_not_served",
        param="model",
    )


def nothing_ready(model: str, waited_s: float) -> Refusal:
    """503: no replica became usable in time."""
    return Refusal(
        status=503,
        message=f"no replica of {model!r} became ready within {waited_s:.0f} s: try again later",
        type="service_unavailable_error",
        code="no_replica_ready",
        retry_after_s=5,
    )


def scaled_to_zero(model: str) -> Refusal:
    """503: nobody wants a replica of this model."""
    return Refusal(
        status=503,
        message=f"the model {model!r} is scaled to zero replicas: "
        f"`redmesh scale {model} <n>` starts some",
        type="service_unavailable_error",
        code="scaled_to_zero",
        retry_after_s=30,
    )


def busy(model: str, retry_after_s: int) -> Refusal:
    """429: every replica is full."""
    return Refusal(
        status=429,
        message=f"every replica of {model!r} is full: try again in {retry_after_s} s",
        type="rate_limit_error",
        code="model_busy",
        retry_after_s=retry_after_s,
    )


def replica_failed(model: str, tries: int, detail: str) -> Refusal:
    """502: tried, and none answered."""
    return Refusal(
        status=502,
        message=f"{tries} replica(s) of {model!r} failed to answer; the last: {detail}",
        type="server_error",
        code="replica_failed",
        retry_after_s=1,
    )


def too_slow(model: str, limit_s: float) -> Refusal:
    """504: the first byte did not come in time."""
    return Refusal(
        status=504,
        message=f"{model!r} did not begin to answer within {limit_s:g} s",
        type="server_error",
        code="request_timeout",
    )


def replica_key_refused(model: str) -> Refusal:
    """502: the replica did not accept our key; not the client's fault."""
    return Refusal(
        status=502,
        message=f"a replica of {model!r} did not accept the proxy's key: agents and proxies "
        "need the same REDMESH_FLEET_SECRET",
        type="server_error",
        code="replica_key_refused",
    )


def stream_broken(detail: str) -> Refusal:
    """Tell of a stream that ended after its first byte."""
    return Refusal(
        status=502,
        message=f"the answer broke off: {detail}; send the request again",
        type="server_error",
        code="stream_broken",
    )


def starting() -> Refusal:
    """503: the models are not known yet."""
    return Refusal(
        status=503,
        message="this proxy is starting and does not know the models yet: send the request again",
        type="service_unavailable_error",
        code="starting",
        retry_after_s=1,
    )


def shutting_down() -> Refusal:
    """503: this proxy ends; another serves."""
    return Refusal(
        status=503,
        message="this proxy is shutting down: send the request again",
        type="service_unavailable_error",
        code="shutting_down",
        retry_after_s=1,
    )


def internal() -> Refusal:
    """500: a fault of ours."""
    return Refusal(
        status=500,
        message="the proxy failed to handle this request; its log tells why",
        type="server_error",
        code="internal_error",
    )
