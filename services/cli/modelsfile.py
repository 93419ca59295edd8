"""Reads a models file: all problems in one go, each with file, place, expected and given.

The shape is checked by the JSON Schema that ships with redmesh; what a schema cannot say (names
that meet twice, bounds that contradict each other, paths that do not exist) is checked as well, for
every model whose shape is right.
Nothing is applied unless everything is valid. Paths are resolved here, against the file's folder:
agents then see absolute paths, or a hub id.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast
from urllib.parse import urlsplit

import jsonschema
import msgspec

from shared.errors import InvalidInputError
from shared.ids import is_name
from shared.models.deployment import DeploymentSpec, EngineKind, EngineSpec

_BIGGEST_FILE_BYTES: Final = 4 << 20


def read(path: Path) -> list[DeploymentSpec]:
    """Read and check `path`; raise one `InvalidInputError` that lists every problem."""
    document = _parse(path)
    problems = list(_schema_problems(document))
    resolved = {
        index: _resolve(spec, path.absolute().parent) for index, spec in _readable(document)
    }
    problems += _meaning_problems(resolved)
    if not problems:
        return list(resolved.values())
    listed = "\n".join(f"  {path}: {problem}" for problem in problems)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise InvalidInputError(f"{count} in the models file, nothing was applied:\n{listed}")


def _readable(document: Any) -> Iterator[tuple[int, DeploymentSpec]]:  # noqa: ANN401 - any JSON
    """Yield the models whose shape is right, with their index: each is judged further by itself."""
    models: Any = cast("dict[str, Any]", document).get("models") if _is_object(document) else None
    for index, model in enumerate(cast("list[Any]", models) if isinstance(models, list) else []):
        try:
            yield index, msgspec.convert(model, type=DeploymentSpec)
        except msgspec.ValidationError:
            continue  # the schema has said why


def _is_object(document: object) -> bool:
    return isinstance(document, dict)


def schema() -> dict[str, Any]:
    """Load the JSON Schema of models files."""
    text = resources.files("shared.models").joinpath("deployments.schema.json").read_text("utf-8")
    return cast("dict[str, Any]", json.loads(text))


def _parse(path: Path) -> Any:  # noqa: ANN401 - any JSON
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > _BIGGEST_FILE_BYTES:
        raise InvalidInputError(f"{path}: larger than 4 MiB: this is not a models file")
    try:
        document = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
        _check_texts(document)
    except json.JSONDecodeError as error:
        raise InvalidInputError(
            f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path}: not JSON: {error}") from error
    return document


def _check_texts(value: object) -> None:
    """Raise ValueError for text that JSON can write and no argument or path can hold."""
    if isinstance(value, dict):
        pairs = cast("dict[str, object]", value)
        for part in (*pairs, *pairs.values()):
            _check_texts(part)
    elif isinstance(value, list):
        for part in cast("list[object]", value):
            _check_texts(part)
    elif isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{value[:40]!r} holds NUL or half a surrogate pair, which no text has")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse a key that stands twice: JSON would silently keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"the key {', '.join(map(repr, twice))} stands twice in one object")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _schema_problems(document: Any) -> Iterator[str]:  # noqa: ANN401 - any JSON
    validator = jsonschema.Draft202012Validator(schema())
    found: Iterable[jsonschema.ValidationError] = validator.iter_errors(document)  # pyright: ignore[reportUnknownMemberType] - the stubs leave the instance untyped
    for error in sorted(found, key=lambda each: [str(part) for part in each.absolute_path]):
        place = error.json_path.removeprefix("$").removeprefix(".") or "the document"
        yield f"{place}: {_say(error)}"


def _say(error: jsonschema.ValidationError) -> str:
    given = json.dumps(error.instance, ensure_ascii=False)
    shown = given if len(given) <= 60 else given[:60] + "…"
    expected: Any = error.validator_value
    match error.validator:
        case "required" | "additionalProperties":
            return _say_fields(error)
        case "type":
            expected = expected if isinstance(expected, str) else " or ".join(expected)
        case "enum":
            expected = ", ".join(json.dumps(each) for each in expected)
        case _:
            pass
    template = _EXPECTED.get(str(error.validator))
    return template.format(expected, shown) if template else error.message


_EXPECTED: Final = MappingProxyType(
    {
        "type": "expected {}, given {}",
        "enum": "expected one of {}, given {}",
        "minimum": "expected {} or more, given {}",
        "maximum": "expected {} or less, given {}",
        "exclusiveMinimum": "expected more than {}, given {}",
        "pattern": "expected text that matches {}, given {}",
        "minItems": "expected at least {} entry",
        "uniqueItems": "expected each entry once, given {1}",
    }
)
"""Keyword of the schema → what to say of a violation: what was expected, what was given."""


def _say_fields(error: jsonschema.ValidationError) -> str:
    content = cast("dict[str, object]", error.instance)
    properties = cast("dict[str, object]", cast("dict[str, Any]", error.schema)["properties"])
    known = ", ".join(sorted(properties))
    if error.validator == "required":
        required = cast("list[str]", error.validator_value)
        missing = ", ".join(repr(name) for name in required if name not in content)
        return f"the field {missing} is missing"
    unknown = ", ".join(repr(name) for name in content if name not in properties)
    return f"unknown field {unknown}; known are: {known}"


def _resolve(spec: DeploymentSpec, folder: Path) -> DeploymentSpec:
    """Make paths of weights and chat template absolute; leave what is no path here (a hub id)."""
    engine = spec.engine
    model, template = engine.model, engine.chat_template
    if model and _exists(folder / _expanded(model)):
        model = str((folder / _expanded(model)).resolve())
    if template is not None:
        template = str((folder / _expanded(template)).resolve())
    return msgspec.structs.replace(
        spec, engine=msgspec.structs.replace(engine, model=model, chat_template=template)
    )


def _expanded(path: str) -> Path:
    """Replace `~` by a home; that of a user who does not exist stays, and is found missing."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a path, or in a folder that we may not search
        return False


def _meaning_problems(specs: Mapping[int, DeploymentSpec]) -> Iterator[str]:
    owners: dict[str, str] = {}
    for index, spec in specs.items():
        place = f"models[{index}]"
        for field, name in [("name", spec.name), *(("aliases", each) for each in spec.aliases)]:
            if not is_name(name):
                yield f"{place}.{field}: {name!r} is not a valid name"
            owner = owners.setdefault(name, f"{place}.{field}")
            if owner != f"{place}.{field}":
                yield f"{place}.{field}: {name!r} is already taken by {owner}"
        bounds = spec.replicas
        if not bounds.min <= bounds.count <= bounds.max:
            yield (
                f"{place}.replicas.count: expected between min ({bounds.min}) and max "
                f"({bounds.max}), given {bounds.count}"
            )
        yield from (f"{place}.engine.{problem}" for problem in _engine_problems(spec.engine))
        if spec.routing.max_requests_per_replica > spec.engine.max_queued_requests:
            yield (
                f"{place}.routing.max_requests_per_replica: expected at most "
                f"engine.max_queued_requests ({spec.engine.max_queued_requests}), "
                f"given {spec.routing.max_requests_per_replica}"
            )
        for field in ("request_timeout_s", "inter_byte_timeout_s", "affinity_relative"):
            if not math.isfinite(getattr(spec.routing, field)):
                yield f"{place}.routing.{field}: expected a finite number"


def _engine_problems(engine: EngineSpec) -> Iterator[str]:
    if engine.kind is EngineKind.EXTERNAL:
        if not engine.urls:
            yield "urls: an external deployment needs the URL of at least one server"
        if len(set(engine.urls)) < len(engine.urls):
            yield "urls: expected each URL once"
        yield from (f"urls: {url!r} is no URL" for url in engine.urls if not _is_url(url))
        return
    if not engine.model:
        yield "model: the hub id or path of the weights is missing"
    elif engine.model.startswith(("/", "./", "../", "~")) and not _exists(Path(engine.model)):
        yield f"model: the path {engine.model!r} does not exist (it is relative to this file)"
    elif not engine.model.startswith("/") and engine.model.count("/") > 1:
        yield (
            f"model: {engine.model!r} is neither a path that exists (it is relative to this file) "
            "nor a hub id, which looks like owner/name"
        )
    if engine.urls or engine.api_key_env is not None:
        yield f"urls and api_key_env are for kind external, not for {engine.kind}"
    template = engine.chat_template
    if template is not None and not Path(template).is_file():
        yield f"chat_template: there is no file {template!r}"
    reserved = [arg for arg in engine.args if arg.split("=", 1)[0] in RESERVED_ARGUMENTS]
    if reserved:
        yield f"args: {', '.join(reserved)} is set by redmesh itself: leave it out"


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, or a port beyond 65535
        return False


RESERVED_ARGUMENTS: Final = frozenset(
    {"--host", "--port", "--model", "--served-model-name", "--api-key"}
)
"""Engine arguments that the agent gives; an API key in the arguments would be visible to all."""
