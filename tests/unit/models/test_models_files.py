"""The models files we ship, and the schema that describes every models file."""

import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import jsonschema
import msgspec
import pytest

from shared.ids import NAME_PATTERN
from shared.models.deployment import (
    DeploymentSpec,
    EngineSpec,
    ModelsFile,
    ReplicaBounds,
    ResourceSpec,
    RoutingSpec,
)

ROOT = Path(__file__).parents[3]
SCHEMA_PATH = ROOT / "shared/models/deployments.schema.json"
SHIPPED = sorted((ROOT / "deploy/models").glob("*.json"))
STRUCTS: dict[str, type[msgspec.Struct]] = {
    "deployment": DeploymentSpec,
    "engine": EngineSpec,
    "resources": ResourceSpec,
    "replicas": ReplicaBounds,
    "routing": RoutingSpec,
}


def load(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    return cast("dict[str, Any]", json.loads(path.read_text("utf-8")))


def problems(document: dict[str, Any]) -> list[str]:
    """Name the places that the schema objects to."""
    validator = jsonschema.Draft202012Validator(load(SCHEMA_PATH))
    errors = cast(
        "Iterator[jsonschema.ValidationError]",
        validator.iter_errors(document),  # pyright: ignore[reportUnknownMemberType] - the stubs leave the instance untyped
    )
    return sorted(error.json_path for error in errors)


def test_the_schema_is_valid() -> None:
    """The schema itself follows draft 2020-12."""
    jsonschema.Draft202012Validator.check_schema(load(SCHEMA_PATH))


@pytest.mark.parametrize("name", STRUCTS)
def test_schema_and_structs_have_the_same_fields_and_defaults(name: str) -> None:
    """Each struct's fields stand in the schema, described, with the same default, and no others."""
    described = load(SCHEMA_PATH)["$defs"][name]
    properties = cast("dict[str, dict[str, Any]]", described["properties"])
    fields = {field.name: field for field in msgspec.structs.fields(STRUCTS[name])}
    assert set(properties) == set(fields)
    assert described["additionalProperties"] is False
    for field_name, content in properties.items():
        if "$ref" in content:
            continue
        assert content["description"].endswith(".")
        field = fields[field_name]
        default = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        if default is msgspec.NODEFAULT:
            assert "default" not in content
        else:
            stored = default.value if isinstance(default, Enum) else default
            assert content["default"] == json.loads(msgspec.json.encode(stored))


@pytest.mark.parametrize("name", STRUCTS)
def test_schema_and_enums_have_the_same_choices(name: str) -> None:
    """Where a struct takes an enum, the schema lists exactly its values."""
    properties = load(SCHEMA_PATH)["$defs"][name]["properties"]
    for field_name, kind in get_type_hints(STRUCTS[name]).items():
        kinds = [kind, *get_args(kind)]
        for candidate in kinds:
            if isinstance(candidate, type) and issubclass(candidate, Enum):
                assert properties[field_name]["enum"] == [member.value for member in candidate]


def test_the_name_pattern_is_the_one_that_guards_keys() -> None:
    """Names in a models file follow the pattern that every key is checked against."""
    pattern = load(SCHEMA_PATH)["$defs"]["deployment"]["properties"]["name"]["pattern"]
    assert pattern == f"^{NAME_PATTERN.pattern}$"


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("$", "{}"),
        ("$", '{"models": [{"name": "m", "engine": {}}], "extra": 1}'),
        ("$.models", '{"models": []}'),
        ("$.models[0]", '{"models": [{"name": "m"}]}'),
        ("$.models[0].name", '{"models": [{"name": "a}:{b", "engine": {}}]}'),
        ("$.models[0].engine", '{"models": [{"name": "m", "engine": {"modell": "x"}}]}'),
        ("$.models[0].engine.kind", '{"models": [{"name": "m", "engine": {"kind": "tgi"}}]}'),
        (
            "$.models[0].engine.urls[0]",
            '{"models": [{"name": "m", "engine": {"urls": ["ftp:x"]}}]}',
        ),
        (
            "$.models[0].replicas.count",
            '{"models": [{"name": "m", "engine": {}, "replicas": {"count": -1}}]}',
        ),
        (
            "$.models[0].resources.cpus",
            '{"models": [{"name": "m", "engine": {}, "resources": {"cpus": 0}}]}',
        ),
    ],
)
def test_wrong_documents_are_refused_at_their_place(place: str, text: str) -> None:
    """Each mistake is found where it stands."""
    assert problems(json.loads(text)) == [place]


def test_there_are_shipped_files() -> None:
    """The four models that redmesh ships have a file each, named like the model."""
    assert [path.stem for path in SHIPPED] == ["demo", "gpt2", "phi2", "tinyllama"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_valid_and_serve_with_and_without_a_gpu(path: Path) -> None:
    """A shipped file meets schema and structs, and its GPU need may fall back to the CPU."""
    document = load(path)
    assert problems(document) == []
    (spec,) = msgspec.convert(document, type=ModelsFile).models
    assert spec.name == path.stem
    assert spec.engine.max_model_len_tokens is not None
    assert spec.resources.gpus == 1
    assert spec.resources.cpu_fallback
    assert spec.resources.gpu_memory_bytes > 0
    assert spec.replicas.min <= spec.replicas.count <= spec.replicas.max
    if spec.engine.chat_template is not None:
        assert (path.parent / spec.engine.chat_template).is_file()
    editor_schema = path.parent / str(document["$schema"])
    assert editor_schema.resolve() == SCHEMA_PATH
