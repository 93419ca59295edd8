"""Every way vLLM says no, with its status and body.

A refusal is raised where it is found and written by the application; the bodies differ by API
(OpenAI's shape, Anthropic's shape, and the bare `detail` of the web framework).
"""

import re
from typing import TypeVar

import msgspec

BUSY_MESSAGE = (
    "The engine is currently busy and cannot accept new requests. "
    "Please try again later or on a different instance."
)
DEAD_MESSAGE = "EngineCore encountered an issue. See stack trace (above) for the root cause."

_Body = TypeVar("_Body")


class RefusalError(Exception):
    """A request that is not served; `param` names the field at fault."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param

    def openai_body(self) -> bytes:
        """Return the body in OpenAI's shape."""
        return msgspec.json.encode({"error": self.openai_error()})

    def openai_error(self) -> dict[str, object]:
        """Return the inner object, as an SSE error event carries it too."""
        return {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.status,
        }

    def anthropic_error(self) -> dict[str, object]:
        """Return the whole body in Anthropic's shape."""
        kinds = {
            400: "invalid_request_error",
            401: "authentication_error",
            404: "not_found_error",
            503: "overloaded_error",
        }
        kind = kinds.get(self.status, "internal_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def bad_request(message: str, param: str | None = None) -> RefusalError:
    """Return the 400 for a value the engine cannot take."""
    return RefusalError(400, "BadRequestError", message, param)


def busy() -> RefusalError:
    """Return the 503 of a full queue."""
    return RefusalError(503, "Service Unavailable", BUSY_MESSAGE)


def dead() -> RefusalError:
    """Return the 500 of an engine whose core has died."""
    return RefusalError(500, "InternalServerError", DEAD_MESSAGE)


def unknown_model(name: str) -> RefusalError:
    """Return the 404 for a model this engine does not serve."""
    message = f"The model `{name}` does not exist."
    return RefusalError(404, "NotFoundError", message, "model")


def read_body(body: bytes, content_type: bytes, decoder: "msgspec.json.Decoder[_Body]") -> _Body:
    """Parse a JSON request body, or raise the 400 that names what is wrong with it."""
    if content_type.split(b";")[0].strip().lower() != b"application/json":
        message = "Unsupported Media Type: Only 'application/json' is allowed"
        raise RefusalError(400, "Bad Request", message)
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        text = str(error)
        param = _field(text)
        raise RefusalError(400, "Bad Request", text, param) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        found = re.search(r"\(byte (\d+)\)", str(error))
        at = found.group(1) if found else str(len(body))
        message = f"JSON decode error at byte {at}: {error}"
        raise RefusalError(400, "Bad Request", message, f"body.{at}") from error


def _field(text: str) -> str:
    """Return `body.messages.0.role` from a message that ends in ``at `$.messages[0].role```."""
    missing = re.search(r"missing required field `([^`]+)`", text)
    found = re.search(r"`\$([^`]*)`$", text)
    path = found.group(1) if found else ""
    path = re.sub(r"\[(\d+|\.\.\.)\]", lambda m: f".{m.group(1)}", path).strip(".")
    parts = ["body", *([path] if path else []), *([missing.group(1)] if missing else [])]
    return ".".join(parts)
