"""What registry writes answer: refusals are values that a caller decides on, not errors."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


class RefusalCode(StrEnum):
    """Why a write was refused; nothing was changed."""

    FENCED = "FENCED"
    """Another controller leads: resign at once."""
    STALEGEN = "STALEGEN"
    """The record is of another incarnation: an agent stops that process."""
    CONFLICT = "CONFLICT"
    """The state (or generation) is another than expected: read again and decide again."""
    ILLEGAL = "ILLEGAL"
    """The table of states does not allow this."""
    ABSENT = "ABSENT"
    """There is no such record: an agent registers its replica again."""
    EXISTS = "EXISTS"
    """The record is there already; `detail` is "<gen> <state>"."""


class Refused(msgspec.Struct, frozen=True):
    """A write that was refused. `detail` holds what Redis knows: epoch, gen or state."""

    code: RefusalCode
    detail: str = ""


class Written(msgspec.Struct, frozen=True):
    """A write that took place (now or at an earlier try): routing version and state after it."""

    ver: int
    state: str = ""


class Fence(msgspec.Struct, frozen=True):
    """The right of a leader to write: its epoch and its name."""

    epoch: int
    owner: str


def fence_args(fence: Fence | None) -> tuple[int | str, str]:
    """Give epoch and owner as scripts expect them; both empty for a write that needs no fence."""
    return (fence.epoch, fence.owner) if fence else ("", "")


class Records(dict[str, T]):
    """Parsed fields of a hash by name. `corrupt` names those that did not parse."""

    def __init__(self, records: Mapping[str, T], corrupt: tuple[str, ...] = ()) -> None:
        super().__init__(records)
        self.corrupt = corrupt


def refused(reply: list[Any]) -> Refused:
    """Read a refusal from a script's reply."""
    detail = " ".join(text_of(part) for part in reply[1:])
    return Refused(RefusalCode(text_of(reply[0])), detail.strip())


def text_of(value: object) -> str:
    """Read one part of a reply as text; foreign bytes never raise."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value)


def pairs(flat: list[Any]) -> dict[bytes, bytes]:
    """Read a flat reply field, value, field, value.. as a dict."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def whole_number(value: object, default: int = 0) -> int:
    """Read a whole number from a reply, `default` for anything else; never raises."""
    try:
        return int(float(text_of(value)))
    except (ValueError, OverflowError):
        return default
