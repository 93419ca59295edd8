"""What `--budget`, `--load` and `--target` say. Pure: text in, structs or one message out."""

from collections.abc import Iterable
from typing import Final, TypeVar

import msgspec

from services.cli.drill.records import Budget
from shared.errors import InvalidInputError

BUDGET_PARTS: Final = ("failed", "broken", "resent", "recover_s", "whole_s", "drift", "drift_s")
TARGET_PARTS: Final = ("model", "replica", "host", "proxy")
LOAD_PARTS: Final = ("users", "tokens", "rate")
LIVE: Final = "live"

T = TypeVar("T", bound=msgspec.Struct)


class LoadWish(msgspec.Struct, frozen=True, kw_only=True):
    """What load there shall be."""

    live: bool = False
    """Drive nothing: watch what there is, through the proxies' metrics."""
    users: int = 8
    """Users that each have one stream after another."""
    tokens: int = 64
    """Length of each answer."""
    rate: float = 0.0
    """Instead of users: streams begun in a second, whatever becomes of the earlier ones."""

    def told(self) -> str:
        """Say it in words."""
        if self.live:
            return "live traffic, watched through the proxies' metrics"
        if self.rate:
            return f"{self.rate:g} streams a second of {self.tokens} tokens each"
        return f"{self.users} users, each with one stream of {self.tokens} tokens after another"


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What the fault shall hit; empty parts are chosen by the drill."""

    model: str = ""
    replica: str = ""
    host: str = ""
    proxy: str = ""


def budget(text: str, base: Budget) -> Budget:
    """Override parts of `base`: `failed=2,recover_s=10`."""
    given = _parts(text, "--budget", BUDGET_PARTS)
    changed = _convert(given, Budget, "--budget", base)
    for name in given:
        if (getattr(changed, name) or 0) < 0:
            raise InvalidInputError(f"--budget {name}: use 0 or more", field="--budget")
    return changed


def load(text: str) -> LoadWish:
    """Read `live`, or parts such as `users=8,tokens=64` or `rate=5`."""
    if text.strip() == LIVE:
        return LoadWish(live=True)
    given = _parts(text, "--load", LOAD_PARTS)
    wish = _convert(given, LoadWish, "--load", LoadWish())
    if "users" in given and "rate" in given:
        raise InvalidInputError("--load: give users or rate, not both", field="--load")
    if not 1 <= wish.users <= 10_000 or not 1 <= wish.tokens <= 100_000:
        raise InvalidInputError(
            "--load: use 1 to 10000 users and 1 to 100000 tokens", field="--load"
        )
    if not 0 <= wish.rate <= 10_000 or ("rate" in given and wish.rate <= 0):
        raise InvalidInputError(
            "--load rate: use a number above 0, at most 10000 streams a second", field="--load"
        )
    return wish


def target(texts: Iterable[str]) -> Target:
    """Read `model=demo`, `replica=demo-1a2b3c`, `host=local-1` or `proxy=NAME-OR-URL`."""
    given: dict[str, str] = {}
    for text in texts:
        given |= _parts(text, "--target", TARGET_PARTS)
    return Target(**given)


def _parts(text: str, option: str, known: Iterable[str]) -> dict[str, str]:
    names = tuple(known)
    found: dict[str, str] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not value or name not in names:
            raise InvalidInputError(
                f"{option} {part!r}: write NAME=VALUE, with a name of {', '.join(names)}",
                field=option,
            )
        found[name] = value
    return found


def _convert(given: dict[str, str], kind: type[T], option: str, base: T) -> T:
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    values: dict[str, object] = {}
    for name, value in given.items():
        try:
            values[name] = msgspec.convert(value, fields[name], strict=False)
        except msgspec.ValidationError:
            raise InvalidInputError(
                f"{option} {name}={value!r}: give a number", field=option
            ) from None
    changed: T = msgspec.structs.replace(base, **values)
    return changed
