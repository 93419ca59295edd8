"""Faults on request: what a drill asks this engine to suffer.

The state is plain data with time left out; the engine and the application look at it where the
fault bites. A fault comes from `POST /sim/faults`, from `--fault` flags, or from the environment
variable REDMESH_SIM_FAULTS (the same words, separated by spaces):

    crash[:after_tokens=N]        the process dies at once, or when N more tokens were generated
    freeze                        the step loop stops; /health stays 200
    slow:factor=F                 every step takes F times as long
    reject[:count=N]              503 as if the queue were full, N times or until cleared
    cut[:after_tokens=N,count=N]  a stream's connection is closed after its Nth token
    engine-dead                   streams get the error event and [DONE], then the process ends
    clear                         none of the above any more
"""

from typing import Literal

import msgspec

KINDS = ("crash", "freeze", "slow", "reject", "cut", "engine-dead", "clear")


class FaultOrder(msgspec.Struct, frozen=True, kw_only=True):
    """One order. `count` 0 means until cleared; `after_tokens` 0 means now (cut: at the first)."""

    kind: Literal["crash", "freeze", "slow", "reject", "cut", "engine-dead", "clear"]
    after_tokens: int = 0
    factor: float = 1.0
    count: int = 0


class Faults(msgspec.Struct, kw_only=True):
    """The faults in force."""

    crash_after_tokens: int | None = None
    frozen: bool = False
    slow_factor: float = 1.0
    reject: bool = False
    rejections_left: int = 0
    cut_after_tokens: int | None = None
    cuts_left: int = 0
    engine_dead: bool = False

    def apply(self, order: FaultOrder) -> None:
        """Put an order in force."""
        match order.kind:
            case "crash":
                self.crash_after_tokens = order.after_tokens
            case "freeze":
                self.frozen = True
            case "slow":
                self.slow_factor = order.factor
            case "reject":
                self.reject = True
                self.rejections_left = order.count
            case "cut":
                self.cut_after_tokens = max(1, order.after_tokens)
                self.cuts_left = order.count
            case "engine-dead":
                self.engine_dead = True
            case "clear":
                self.crash_after_tokens = self.cut_after_tokens = None
                self.frozen = self.reject = False
                self.slow_factor = 1.0

    def take_rejection(self) -> bool:
        """Return whether this request is refused, and count it."""
        if not self.reject:
            return False
        if self.rejections_left:
            self.rejections_left -= 1
            self.reject = self.rejections_left > 0
        return True

    def take_cut(self, stream_tokens: int) -> bool:
        """Return whether a run that has `stream_tokens` tokens is cut now, and count it."""
        if self.cut_after_tokens is None or stream_tokens < self.cut_after_tokens:
            return False
        if self.cuts_left:
            self.cuts_left -= 1
            if not self.cuts_left:
                self.cut_after_tokens = None
        return True


def parse_fault(text: str) -> FaultOrder:
    """Return the order that `kind[:key=value,…]` writes; ValueError says what is wrong."""
    kind, _, rest = text.partition(":")
    fields: dict[str, object] = {"kind": kind}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        fields[key] = value
    try:
        return check_fault(msgspec.convert(fields, FaultOrder, strict=False), fields)
    except msgspec.ValidationError as error:
        message = f"fault {text!r}: {error}; kinds are {', '.join(KINDS)}"
        raise ValueError(message) from error


def check_fault(order: FaultOrder, fields: dict[str, object]) -> FaultOrder:
    """Refuse what types cannot: unknown fields, negative numbers, a factor that stops time."""
    unknown = set(fields) - set(FaultOrder.__struct_fields__)
    if unknown:
        message = f"unknown field {min(unknown)!r}"
        raise msgspec.ValidationError(message)
    if order.after_tokens < 0 or order.count < 0 or order.factor <= 0:
        message = "after_tokens and count must be at least 0, factor above 0"
        raise msgspec.ValidationError(message)
    return order
