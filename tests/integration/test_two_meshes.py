"""Two meshes on one machine: each in its state directory, each knowing only its own."""

from pathlib import Path

import httpx
import pytest

from tests.support.mesh import left_behind, redmesh, sim_model, start, write_models

pytestmark = pytest.mark.mesh


def chat(url: str, model: str) -> int:
    """Ask once and return the status."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=10).status_code


def test_down_stops_its_own_mesh_and_no_other(tmp_path: Path) -> None:
    """While one mesh is stopped the other one keeps every process and goes on serving."""
    blue = write_models(tmp_path / "blue.json", sim_model("blue"))
    green = write_models(tmp_path / "green.json", sim_model("green"))
    with (
        start(blue, proxies=1, controllers=1) as kept,
        start(green, proxies=1, controllers=1) as stopped,
    ):
        assert (chat(kept.urls[0], "blue"), chat(kept.urls[0], "green")) == (200, 404)
        assert (chat(stopped.urls[0], "green"), chat(stopped.urls[0], "blue")) == (200, 404)
        again = redmesh("up", "--models", green, "--detach", "--state-dir", stopped.state.path)
        assert again.code == 2, again
        assert "in use" in again.err
        before = {process.pid for process in left_behind(kept.mark)}
        done = stopped.redmesh("down")
        assert done.code == 0, done
        assert left_behind(stopped.mark) == []
        assert {process.pid for process in left_behind(kept.mark)} == before
        assert chat(kept.urls[0], "blue") == 200
        gone = stopped.redmesh("get", "deployments")
        assert gone.code == 1, gone
        assert "no mesh runs from" in gone.err
