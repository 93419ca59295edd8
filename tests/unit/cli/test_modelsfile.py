import json
from pathlib import Path
from typing import Any

import pytest

from services.cli import modelsfile
from shared.errors import InvalidInputError
from shared.models.deployment import EngineKind


def _write(folder: Path, document: object) -> Path:
    path = folder / "models.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def _problems(folder: Path, document: object) -> str:
    with pytest.raises(InvalidInputError) as caught:
        modelsfile.read(_write(folder, document))
    return str(caught.value)


def _model(**more: object) -> dict[str, Any]:
    return {"name": "m", "engine": {"model": "owner/name"}, **more}


def test_the_shipped_models_files_are_valid() -> None:
    """Every models file that ships passes the check that `apply` makes."""
    files = sorted(Path("deploy/models").glob("*.json"))
    assert [spec.name for path in files for spec in modelsfile.read(path)]


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    """Every problem of a file is named in one run, each with its place in the document."""
    text = _problems(
        tmp_path,
        {
            "models": [
                {"name": "a b", "engine": {"kind": "x", "max_num_seqs": 0, "modle": "y"}},
                {"engine": {"model": "o/n"}, "replicas": {"count": "2"}},
            ],
            "more": 1,
        },
    )
    for place in (
        "models[0].name: expected text",
        'models[0].engine.kind: expected one of "vllm", "sim", "external", given "x"',
        "models[0].engine.max_num_seqs: expected 1 or more, given 0",
        "models[0].engine: unknown field 'modle'",
        "models[1]: the field 'name' is missing",
        'models[1].replicas.count: expected integer, given "2"',
        "the document: unknown field 'more'",
    ):
        assert place in text
    assert "7 problems" in text


@pytest.mark.parametrize(
    ("document", "part"),
    [
        ("{", ":1:2: not JSON"),
        ('{"models": [], "models": []}', "stands twice"),
        ('{"models": NaN}', "not a JSON number"),
        ({"models": []}, "models: expected at least 1 entry"),
        ([], "expected object"),
        (
            {"models": [_model(), _model()]},
            "models[1].name: 'm' is already taken by models[0].name",
        ),
        ({"models": [_model(aliases=["m"])]}, "already taken"),
        (
            {"models": [_model(replicas={"count": 3, "max": 2})]},
            "models[0].replicas.count: expected between min (0) and max (2), given 3",
        ),
        ({"models": [_model(engine={})]}, "engine.model: the hub id or path"),
        ({"models": [_model(engine={"model": "./gone"})]}, "does not exist"),
        ({"models": [_model(engine={"model": "a/b/c"})]}, "neither a path that exists"),
        ({"models": [_model(engine={"kind": "external"})]}, "engine.urls"),
        ({"models": [_model(engine={"model": "o/n", "chat_template": "no.jinja"})]}, "no file"),
        ({"models": [_model(engine={"model": "o/n", "args": ["--port=1"]})]}, "--port=1"),
        ({"models": [_model(engine={"model": "o/n", "max_queued_requests": 1})]}, "at most"),
    ],
)
def test_each_kind_of_problem_is_named(tmp_path: Path, document: object, part: str) -> None:
    """A bad file is refused with a message that names what is wrong and where."""
    assert part in _problems(tmp_path, document)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file is bad input, not a crash."""
    with pytest.raises(InvalidInputError, match=r"nowhere\.json: cannot be read"):
        modelsfile.read(tmp_path / "nowhere.json")


def test_paths_are_taken_from_the_files_folder(tmp_path: Path) -> None:
    """Weights and chat template are found beside the models file; a hub id stays what it is."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "chat.jinja").write_text("")
    document = {
        "models": [
            _model(engine={"model": "weights", "chat_template": "chat.jinja"}),
            {"name": "n", "engine": {"model": "owner/name"}},
        ]
    }
    here, hub = modelsfile.read(_write(tmp_path, document))
    assert here.engine.model == str(tmp_path / "weights")
    assert here.engine.chat_template == str(tmp_path / "chat.jinja")
    assert hub.engine.model == "owner/name"


def test_external_servers_need_no_weights(tmp_path: Path) -> None:
    """An external deployment is declared by the URLs of its servers alone."""
    document = {"models": [_model(engine={"kind": "external", "urls": ["http://10.0.0.1:80"]})]}
    (spec,) = modelsfile.read(_write(tmp_path, document))
    assert spec.engine.kind is EngineKind.EXTERNAL


def test_a_wrong_shape_hides_no_other_problem(tmp_path: Path) -> None:
    """One model's wrong type and another's contradiction are reported in the same run."""
    models = [_model(name="a", engine={"kind": 1}), _model(name="b", replicas={"count": -1})]
    models.append(_model(name="c", replicas={"count": 3, "max": 2}))
    text = _problems(tmp_path, {"models": models})
    for place in ("models[0].engine.kind", "models[1].replicas.count", "models[2].replicas.count"):
        assert place in text


@pytest.mark.parametrize(
    ("engine", "part"),
    [
        ({"model": "~no-such-user/weights"}, "engine.model: the path '~no-such-user/weights'"),
        ({"model": "o/n", "chat_template": "~no-such-user/t"}, "there is no file"),
        ({"model": "w" * 300 + "/a/b"}, "neither a path that exists"),
        ({"model": "a\0b"}, "NUL"),
        ({"model": "o/n", "args": ["\ud800"]}, "surrogate"),
        ({"model": "o/n", "env": {"A": "\0"}}, "NUL"),
        ({"kind": "external", "urls": ["http://h:99999"]}, "'http://h:99999' is no URL"),
        ({"kind": "external", "urls": ["http://[bad"]}, "'http://[bad' is no URL"),
    ],
)
def test_what_no_engine_could_be_given_is_refused(
    tmp_path: Path, engine: dict[str, object], part: str
) -> None:
    """Text, paths and URLs that the system would refuse later are problems of the file."""
    assert part in _problems(tmp_path, {"models": [_model(engine=engine)]})
