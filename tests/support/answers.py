"""Streams as a client understands them, whatever chunks they came in; and when two are the same."""

import json
from collections.abc import Iterator
from typing import Any, cast

import msgspec
import pytest


class Answer(msgspec.Struct, kw_only=True):
    """A stream as a client understands it, whatever chunks it came in."""

    text: str = ""
    ids: list[int] = []
    logprobs: list[Any] = []
    offsets: list[int] = []
    finish: list[Any] = []
    usage: Any = None
    roles: int = 0
    done: bool = False
    errors: list[Any] = []
    identities: set[tuple[str, int, str, str]] = set()
    shown_ids: int = 0
    """Chunks whose token ids were shown."""
    shapes: dict[str, set[frozenset[str]]] = {}
    """Kind of chunk → the sets of fields that its chunks had, as dotted paths."""


def read(body: bytes) -> Answer:
    """Read a stream."""
    answer = Answer()
    for event in body.decode().split("\n\n"):
        if event == "data: [DONE]":
            answer.done = True
        elif event.startswith("data: "):
            _add(answer, json.loads(event[6:]))
    return answer


def _add(answer: Answer, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        answer.errors.append(chunk["error"])
        return
    answer.identities.add((chunk["id"], chunk["created"], chunk["model"], chunk["object"]))
    answer.shapes.setdefault(_kind(chunk), set()).add(frozenset(_fields("", chunk)))
    answer.usage = chunk.get("usage") or answer.usage
    for choice in chunk["choices"]:
        delta = choice.get("delta") or {"content": choice.get("text")}
        answer.roles += "role" in delta
        answer.text += delta.get("content") or ""
        answer.ids += choice.get("token_ids") or []
        answer.shown_ids += choice.get("token_ids") is not None
        logprobs = choice.get("logprobs")
        if logprobs and "content" in logprobs:
            answer.logprobs += logprobs["content"]
        elif logprobs:
            answer.offsets += logprobs["text_offset"]
            answer.logprobs += list(
                zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
            )
        if choice["finish_reason"] is not None:
            answer.finish.append((choice["finish_reason"], choice.get("stop_reason")))


def _kind(chunk: dict[str, Any]) -> str:
    if not chunk["choices"]:
        return "usage"
    choice = chunk["choices"][0]
    if choice["finish_reason"] is not None:
        return "finish"
    return "role" if "role" in choice.get("delta", {}) else "text"


def _fields(at: str, value: object) -> Iterator[str]:
    """Name every field below `value`; of a list's items those of the first, if they are objects."""
    if isinstance(value, list):
        yield from _fields(at, cast("list[object]", value)[0] if value else None)
    elif isinstance(value, dict):
        for name, below in cast("dict[str, object]", value).items():
            yield f"{at}{name}"
            if name != "top_logprobs":  # a completion's has tokens for names
                yield from _fields(f"{at}{name}.", below)


def same(got: Answer, wanted: Answer, *, noise: float = 0.0) -> None:
    """Compare everything but the identity, of which there must be exactly one.

    Chunks may be cut otherwise, but each has the fields that chunks of its kind have. A log
    probability may differ by `noise`: the sums of a real engine have another order, on some
    processors, where the prompt is in its cache or others are computed beside it.
    """
    assert got.errors == []
    assert len(got.identities) == 1
    assert got.done
    for field in ("text", "ids", "offsets", "finish", "usage", "roles"):
        one, other = getattr(got, field), getattr(wanted, field)
        assert one == other, f"{field}: {one} instead of {other}"
    if noise:
        levels = [[_levels(entry) for entry in answer.logprobs] for answer in (got, wanted)]
        for each, known in zip(*levels, strict=True):
            assert each == pytest.approx(known, abs=noise), (each, known)
    else:
        assert got.logprobs == wanted.logprobs
    for kind, shapes in got.shapes.items():
        known = wanted.shapes.get(kind, set())
        if kind == "usage":
            # A proxy that tells the usage itself, since the replica died just before, cannot know
            # this one.
            known = known | {shape - {"system_fingerprint"} for shape in known}
        for shape in shapes - known:
            raise AssertionError(f"fields of {kind}: {sorted(shape)} instead of one of {known}")


def _levels(entry: Any) -> dict[str, float]:  # noqa: ANN401 - JSON
    """Give the log probability of one position's token, and those of its alternatives by rank."""
    if isinstance(entry, dict):
        told = cast("dict[str, Any]", entry)
        token, level = told["token"], told["logprob"]
        others: list[float] = [each["logprob"] for each in told["top_logprobs"]]
    else:
        token, level = cast("tuple[str, float]", entry)
        others = []
    ranked = {f"rank {number}": value for number, value in enumerate(sorted(others))}
    return {token: level, **ranked}


def blank(body: bytes) -> list[Any]:
    """Read the events, without identity and time."""
    events: list[Any] = []
    for event in body.decode().split("\n\n"):
        if event.startswith("data: {"):
            chunk = json.loads(event[6:])
            events.append({**chunk, "id": "", "created": 0})
        else:
            events.append(event)
    return events
