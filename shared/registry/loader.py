"""The Lua scripts: what each expects, and how their texts are assembled.

A `ScriptSpec` is the Python side of a script's contract: its name, its keys in order and the
statuses it answers. The header of `lua/<name>.lua` says the same, and a test compares the two.
`ScriptLibrary.load` reads all scripts once, replaces each `--@include lib/x` by that fragment (once
per script) and keeps a map of lines, because Redis reports lines of the assembled text.
"""

import hashlib
from pathlib import Path
from typing import Final, NamedTuple

INCLUDE: Final = "--@include "


class ScriptSpec(NamedTuple):
    """What Python knows of one script."""

    name: str
    """`<noun>/<verb>`: its file under `lua/`."""
    tag: str
    """`M` for a model's keys, `ctl` for the fleet's, `*` for any."""
    keys: tuple[str, ...]
    """Key suffixes in the order of KEYS."""
    statuses: tuple[str, ...]
    """First element of a reply; the hot script answers none."""


class Script(NamedTuple):
    """An assembled script."""

    name: str
    text: str
    sha: str
    lines: tuple[str, ...]
    """For each line of `text`, the file and line it comes from."""

    def origin(self, line: int) -> str:
        """Tell from which source line the assembled `line` (from 1) comes."""
        if 1 <= line <= len(self.lines):
            return self.lines[line - 1]
        return f"{self.name}:{line}"


class ScriptLibrary:
    """All scripts by name."""

    def __init__(self, scripts: dict[str, Script]) -> None:
        self._scripts = scripts

    def __getitem__(self, name: str) -> Script:
        return self._scripts[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all scripts, sorted."""
        return tuple(sorted(self._scripts))

    @classmethod
    def load(cls, folder: Path | None = None) -> "ScriptLibrary":
        """Read and assemble every script under `folder`. Reads files: not for the event loop."""
        root = folder or scripts_folder()
        names = sorted(
            path.relative_to(root).with_suffix("").as_posix()
            for path in root.glob("*/*.lua")
            if path.parent.name != "lib"
        )
        if not names:
            raise FileNotFoundError(f"no Lua scripts in {root}: install redmesh again")
        return cls({name: assemble(root, name) for name in names})


def scripts_folder() -> Path:
    """Find the scripts: `shared/_lua` of an installed package, else `lua/` of a checkout."""
    shared = Path(__file__).resolve().parent.parent
    installed = shared / "_lua"
    return installed if installed.is_dir() else shared.parent / "lua"


def assemble(root: Path, name: str) -> Script:
    """Assemble one script; an include of an unknown fragment raises FileNotFoundError."""
    text: list[str] = []
    lines: list[str] = []
    included: set[str] = set()

    def add(part: str) -> None:
        content = (root / f"{part}.lua").read_text(encoding="utf-8")
        for number, line in enumerate(content.splitlines(), start=1):
            if not line.startswith(INCLUDE):
                text.append(line)
                lines.append(f"lua/{part}.lua:{number}")
                continue
            fragment = line.removeprefix(INCLUDE).strip()
            if fragment not in included:
                included.add(fragment)
                add(fragment)

    add(name)
    whole = "\n".join(text) + "\n"
    # SHA-1 is how Redis names scripts; nothing here depends on its strength.
    sha = hashlib.sha1(whole.encode(), usedforsecurity=False).hexdigest()
    return Script(name, whole, sha, tuple(lines))
