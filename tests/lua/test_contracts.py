"""Each script says in its header what it does; here the header is held against the Python side."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from shared.models.replica import TRANSITIONS, ReplicaState
from shared.registry import fleet, leadership, ledger, replicas, specs, streams
from shared.registry.keys import FLEET_KEYS, MODEL_KEYS, STREAM_KEYS
from shared.registry.loader import ScriptLibrary, ScriptSpec, assemble, scripts_folder
from shared.registry.scripts import main
from tests.support.servers import RedisServer

SPECS = {
    spec.name: spec
    for module in (fleet, leadership, ledger, replicas, specs, streams)
    for spec in vars(module).values()
    if isinstance(spec, ScriptSpec)
}
NAMES = sorted(SPECS)
SECTIONS = ("Guarantee", "KEYS", "ARGV", "RETURN", "Cost", "Callers")
SERVICES = {"proxy", "controller", "agent", "cli"}


def source(name: str) -> str:
    """Read a script as it stands in the tree."""
    return (scripts_folder() / f"{name}.lua").read_text()


def section(name: str, title: str) -> tuple[str, list[str]]:
    """Give the rest of a section's first line, and its further lines, without comment marks."""
    lines = [line[3:] for line in source(name).splitlines() if line.startswith("-- ")]
    starts = [n for n, line in enumerate(lines) if re.match(rf"{title}\b", line)]
    assert len(starts) == 1, f"{name} must have one section {title}"
    body: list[str] = []
    for line in lines[starts[0] + 1 :]:
        if not line.startswith("  "):
            break
        body.append(line.strip())
    return lines[starts[0]].removeprefix(title).strip(" :"), body


def test_every_script_has_a_python_side() -> None:
    """Each script in the tree is declared by one typed function's module, and no other is."""
    assert set(ScriptLibrary.load().names) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_header(name: str) -> None:
    """The header has every section in order and its first line names the script and its purpose."""
    text = source(name)
    assert re.match(rf"-- {name}: \S.*\.\n--\n", text)
    places = [text.index(f"\n-- {title}") for title in SECTIONS]
    assert places == sorted(places)
    assert len(text.splitlines()) <= 85


@pytest.mark.parametrize("name", NAMES)
def test_keys(name: str) -> None:
    """The header's KEYS are those that Python passes, in order, with the documented types."""
    spec = SPECS[name]
    count, listed = section(name, "KEYS")
    lines = [line for line in listed if line[0].isdigit()]
    assert int(count.rstrip("+")) == len(spec.keys) == len(lines)
    assert count.endswith("+") == any(line.startswith("then") for line in listed)
    known = {
        "M": MODEL_KEYS,
        "ctl": FLEET_KEYS,
        "s:<id>": STREAM_KEYS,
        "*": {"*": "any"},
    }[spec.tag]
    for number, (line, suffix) in enumerate(zip(lines, spec.keys, strict=True), start=1):
        place, kind, pattern = line.split()
        assert (int(place), pattern) == (number, f"{{{spec.tag}}}:{suffix}")
        assert spec.tag == "*" or known[suffix] == kind


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_bound_once_and_all_used(name: str) -> None:
    """The body binds exactly the KEYS that the header promises."""
    numbers = {int(number) for number in re.findall(r"KEYS\[(\d+)\]", source(name))}
    wanted = set(range(1, len(SPECS[name].keys) + 1))
    assert numbers == wanted or "DEL', KEYS[index]" in source(name)


@pytest.mark.parametrize("name", NAMES)
def test_arguments(name: str) -> None:
    """ARGV gives a count, numbered lines with a type or unit each, and the body reads as many."""
    count, lines = section(name, "ARGV")
    fixed = [line for line in lines if line[0].isdigit()]
    assert int(count.rstrip("+")) == len(fixed)
    assert [line.split()[0] for line in fixed] == [str(n) for n in range(1, len(fixed) + 1)]
    assert all(re.fullmatch(r"\d+ \w+: \S.*", line) for line in fixed)
    assert count.endswith("+") == any(line.startswith("then") for line in lines)
    read = {int(number) for number in re.findall(r"ARGV\[(\d+)\]", source(name))}
    assert read == set(range(1, len(fixed) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_statuses(name: str) -> None:
    """RETURN lists exactly the statuses that Python declares, and the text can produce each."""
    _, lines = section(name, "RETURN")
    listed = {line.split()[0].rstrip(":") for line in lines if re.match(r"[A-Z]{2,}\b", line)}
    assert listed == set(SPECS[name].statuses)
    text = assemble(scripts_folder(), name).text
    assert all(f"'{status}'" in text for status in listed)


@pytest.mark.parametrize("name", NAMES)
def test_callers(name: str) -> None:
    """Callers are services of this project."""
    callers, _ = section(name, "Callers")
    assert set(callers.split(", ")) <= SERVICES


@pytest.mark.parametrize("name", NAMES)
def test_guard_comes_first(name: str) -> None:
    """The first command of every script is a write that changes nothing.

    Where the key may hold any type, its error is looked at, and all but the type's is handed on.
    """
    body = "\n".join(line for line in source(name).splitlines() if not line.startswith("--"))
    first = re.search(r"redis\.(p?call)\(([^)]*)\)(.*?\nend)?", body, re.DOTALL)
    assert first
    assert re.fullmatch(r"'(HDEL|ZREM)', [\w.]+, ''", first[2])
    if first[1] == "pcall":
        assert "not string.find(tostring(guard.err), 'WRONGTYPE', 1, true)" in first[3]
        assert "return guard" in first[3]


@pytest.mark.parametrize("path", sorted((scripts_folder() / "lib").glob("*.lua")), ids=str)
def test_fragments(path: Path) -> None:
    """A fragment is one local function of its file's name, described above it."""
    text = path.read_text()
    assert re.findall(r"^local function (\w+)", text, re.MULTILINE) == [path.stem]
    assert text.startswith(f"-- {path.stem}(")
    assert not re.search(r"\b(KEYS|ARGV)\b", text)


def test_states_agree(redis_server: RedisServer) -> None:
    """The table of states in Lua is the table in Python."""
    text = (scripts_folder() / "lib" / "states.lua").read_text()
    reply = redis_server.command("EVAL", text + "return cjson.encode(states())", 0)
    import msgspec  # noqa: PLC0415 - needed here only

    table = msgspec.json.decode(reply, type=dict[str, dict[str, bool]])
    assert {state: set(after) for state, after in table.items()} == {
        str(state): {str(next_state) for next_state in TRANSITIONS[state]} for state in ReplicaState
    }


def test_assembled_scripts_are_clean(tmp_path: Path) -> None:
    """Luacheck finds nothing in the assembled scripts: no globals, no unused or shadowed names."""
    assert main(["--out", str(tmp_path)]) == 0
    files = sorted(tmp_path.glob("*.lua"))
    assert len(files) == len(NAMES)
    luacheck = shutil.which("luacheck")
    if luacheck is None:
        pytest.fail("no luacheck on PATH: run `make system`")
    config = Path(__file__).parents[2] / ".luacheckrc"
    done = subprocess.run(
        [luacheck, "--no-color", "--config", str(config), *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


def test_line_map(tmp_path: Path) -> None:
    """An error's line in the assembled text leads back to file and line of its source."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "lib" / "one.lua").write_text("-- one\nlocal function one() end\n")
    (tmp_path / "a" / "b.lua").write_text("-- b\n--@include lib/one\n--@include lib/one\none()\n")
    script = assemble(tmp_path, "a/b")
    assert script.text == "-- b\n-- one\nlocal function one() end\none()\n"
    assert [script.origin(n) for n in range(1, 6)] == [
        "lua/a/b.lua:1",
        "lua/lib/one.lua:1",
        "lua/lib/one.lua:2",
        "lua/a/b.lua:4",
        "a/b:5",
    ]
