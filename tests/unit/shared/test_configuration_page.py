from pathlib import Path

import msgspec
import pytest

from services.agent.settings import AgentSettings
from services.controller.settings import ControllerSettings
from services.proxy.settings import ProxySettings
from shared.models import deployment
from shared.secret import Secret
from shared.settings import CommonSettings, variable

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"
SECTIONS = {
    "## Every service": CommonSettings,
    "## Proxy": ProxySettings,
    "## Controller": ControllerSettings,
    "## Agent": AgentSettings,
    "### A model": deployment.DeploymentSpec,
    "### `engine`": deployment.EngineSpec,
    "### `resources`": deployment.ResourceSpec,
    "### `replicas`": deployment.ReplicaBounds,
    "### `routing`": deployment.RoutingSpec,
}


def _rows(heading: str) -> dict[str, tuple[str, str]]:
    """Read the table under `heading`: first cell → default, meaning."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:3] == "| `"]
    return {cell[0].strip("`"): (cell[1].strip("`"), " | ".join(cell[2:])) for cell in cells}


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_page_names_every_setting_with_its_meaning(heading: str) -> None:
    """Each setting that a person can give stands on the page, and nothing else does."""
    kind = SECTIONS[heading]
    inherited = set(CommonSettings.__struct_fields__)
    own = set(kind.__struct_fields__) - (inherited if kind is not CommonSettings else set())
    names = {variable(f) if issubclass(kind, CommonSettings) else f for f in own}
    rows = _rows(heading)
    assert set(rows) == names
    assert all(meaning.strip() for _, meaning in rows.values())


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_page_tells_the_true_defaults(heading: str) -> None:
    """A default on the page is the default in the code."""
    kind = SECTIONS[heading]
    rows = _rows(heading)
    for field in msgspec.structs.fields(kind):
        row = rows.get(field.name) or rows.get(variable(field.name))
        plain = isinstance(field.default, str | int | float) and not isinstance(
            field.default, Secret
        )
        if row is None or not plain:
            continue
        wanted = str(field.default).lower() if isinstance(field.default, bool) else field.default
        assert row[0] == (str(wanted) or "empty"), field.name
