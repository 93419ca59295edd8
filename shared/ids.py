"""Names and identifiers: what may come near a Redis key, and how new ones are made.

Every name of a model, alias, replica, host, proxy, controller or tenant must match one pattern
before it is put into a key. The pattern has no braces, blanks or control characters, so no name
can move a key into another hash slot.
"""

import re
import secrets
from typing import Final

from shared.errors import InvalidInputError
from shared.wording import short

NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
"""A valid name, matched in full: 1 to 128 characters."""

_REQUEST_IDS: Final = 256
_request_ids: list[str] = []
_UNSLUGGABLE: Final = re.compile(r"[^a-z0-9-]+")


def is_name(text: str) -> bool:
    """Tell whether `text` is a valid name."""
    return NAME_PATTERN.fullmatch(text) is not None


def check_name(kind: str, text: str) -> str:
    """Return `text` unchanged, or raise `InvalidInputError` that names `kind` and the remedy."""
    if is_name(text):
        return text
    raise InvalidInputError(
        f"{kind} {short(text)!r} is not a valid name: "
        "use 1 to 128 letters, digits and . _ : / @ + -, starting with a letter or digit",
        field=kind,
    )


def new_request_id() -> str:
    """Make a request id: 32 hexadecimal digits, unique without coordination.

    They are made many at a time: asking the kernel for each costs microseconds.
    """
    if not _request_ids:
        digits = secrets.token_hex(16 * _REQUEST_IDS)
        _request_ids.extend(digits[at : at + 32] for at in range(0, len(digits), 32))
    return _request_ids.pop()


def new_suffix() -> str:
    """Make the short random part that tells two processes or replicas of one name apart."""
    return secrets.token_hex(3)


def slug(text: str) -> str:
    """Reduce `text` to lower-case letters, digits and dashes, for parts of generated names."""
    reduced = _UNSLUGGABLE.sub("-", text.lower()).strip("-")
    return reduced[:48] or "x"


def new_replica_id(model: str) -> str:
    """Make a replica id that a person recognises: `<slug of the model>-<random>`."""
    return f"{slug(model)}-{new_suffix()}"
