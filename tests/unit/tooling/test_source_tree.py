"""Rules about files that no linter knows."""

import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
WRITTEN_BY_HAND = {".py", ".lua", ".sh", ".md", ".c"}
LONGEST = 500


def own_files() -> list[Path]:
    """Return the files of the project: those in git and those that could be added."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],  # noqa: S607 - git as installed
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [REPOSITORY / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file()]


def test_every_file_fits_in_the_head() -> None:
    """No file written by hand is longer than 500 lines."""
    too_long = {
        str(path.relative_to(REPOSITORY)): lines
        for path in own_files()
        if path.suffix in WRITTEN_BY_HAND
        and (lines := len(path.read_text().splitlines())) > LONGEST
    }
    assert too_long == {}


def test_no_file_is_a_placeholder() -> None:
    """Only package markers may be empty: a file appears when it has something real in it."""
    empty = [
        str(path.relative_to(REPOSITORY))
        for path in own_files()
        if path.stat().st_size == 0 and path.name not in {"__init__.py", "py.typed"}
    ]
    assert empty == []
