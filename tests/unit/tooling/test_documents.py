"""The documents hold together: links lead somewhere, and decisions are numbered and complete."""

import os
import re
import tomllib
from pathlib import Path
from typing import Final

from tests.unit.tooling.test_source_tree import REPOSITORY, own_files

CODE: Final = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
PROOF: Final = re.compile(
    r"`((?:drills|e2e|integration|lua|partitions|simulation|unit)/[\w/]+\.py)`"
)


def documents() -> dict[Path, str]:
    """Read every document, without its blocks of code."""
    paths = [path for path in own_files() if path.suffix == ".md"]
    return {path: CODE.sub("", path.read_text()) for path in paths}


def anchor(heading: str) -> str:
    """Make of a heading what a link to it says."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def test_every_link_leads_somewhere() -> None:
    """Files that documents link to are there, and so are the headings within them."""
    texts = documents()
    headings = {
        path: {anchor(each) for each in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
        for path, text in texts.items()
    }
    broken: list[str] = []
    for path, text in texts.items():
        for link in LINK.findall(text):
            if link.startswith(("http:", "https:", "mailto:")):
                continue
            name, _, heading = link.partition("#")
            target = Path(os.path.normpath(path.parent / name)) if name else path
            if not target.exists() or (heading and heading not in headings.get(target, ())):
                broken.append(f"{path.relative_to(REPOSITORY)}: {link}")
    assert broken == []


def test_every_test_that_a_promise_names_exists() -> None:
    """The failure model proves its rows by tests that are there."""
    text = (REPOSITORY / "docs/failure-model.md").read_text()
    named = set(PROOF.findall(text))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (REPOSITORY / "tests" / name).exists()] == []


def test_decisions_are_numbered_and_complete() -> None:
    """Each decision has the next number, in name and heading, and says all that one should."""
    pages = sorted((REPOSITORY / "docs/decisions").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for number, page in enumerate(pages, 1):
        text = page.read_text()
        assert text.startswith(f"# {number}. "), page.name
        for part in ("Context", "Choice", "Price", "[Rr]evisit"):
            assert re.search(rf"(\*\*|^## ).{{0,8}}{part}", text, re.MULTILINE), (page.name, part)


def test_import_contracts_have_no_exceptions() -> None:
    """What a contract forbids is forbidden everywhere."""
    tools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]
    for contract in tools["importlinter"]["contracts"]:
        assert not [key for key in contract if key.startswith("ignore")], contract["name"]
