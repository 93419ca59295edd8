"""`redmesh up` and `down` as an operator meets them, with real processes and simulated engines."""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Generator
from pathlib import Path

import pytest

from services.cli.statedir import StateDir
from tests.support.mesh import (
    MARK,
    REDMESH,
    ROOT,
    environment,
    free_ports,
    left_behind,
    redis_server,
    redmesh,
    sim_model,
    start,
    write_models,
)
from tests.support.waiting import wait_until_sync

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(300)]

GONE_S = 60.0
"""Within this all processes of a mesh without load must have ended."""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Declare one small model."""
    return write_models(tmp_path / "models.json", sim_model("tiny"))


class Foreground:
    """An `up` that was not detached, with what it has written."""

    def __init__(self, process: "subprocess.Popen[bytes]", output: Path, mark: str) -> None:
        self.process = process
        self.mark = mark
        self._output = output

    @property
    def text(self) -> str:
        """All that it wrote, to stdout and stderr."""
        return self._output.read_text()

    def wait_nothing_left(self) -> None:
        """Wait until no process that it started runs."""
        wait_until_sync(
            lambda: not left_behind(self.mark), timeout_s=GONE_S, what="nothing is left"
        )


@contextlib.contextmanager
def _foreground(models: Path, *more: str) -> Generator[Foreground]:
    """Run `redmesh up` in the foreground until it is ready; end whatever is left afterwards."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="redmesh-up-", ignore_cleanup_errors=True) as folder:
        output = Path(folder) / "output"
        with output.open("wb") as out:
            process = subprocess.Popen(
                [
                    *(REDMESH, "up", "--models", str(models), "--engine", "sim"),
                    *("--state-dir", f"{folder}/state", "--port", str(free_ports(2)), *more),
                ],
                cwd=ROOT,
                env=environment({MARK: mark}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        up = Foreground(process, output, mark)
        try:
            wait_until_sync(
                lambda: "redmesh is ready" in up.text or process.poll() is not None,
                timeout_s=90,
                what="up is ready",
            )
            assert process.poll() is None, up.text
            yield up
        finally:
            for left in left_behind(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(left.pid, signal.SIGKILL)
            process.wait(10)


def _pasted(block: str) -> list[str]:
    """Take the commands from what `up` printed, one entry a command, continued lines joined."""
    commands = re.sub(r"\\\n", "", block)
    return [
        line
        for line in commands.splitlines()
        if line.startswith(("curl", "redis-cli", "export", REDMESH)) or "redmesh get" in line
    ]


def test_what_up_prints_works_as_pasted(models: Path) -> None:
    """Each printed command succeeds in bash, and each proxy answers as JSON stream and as text."""
    with tempfile.TemporaryDirectory(prefix="redmesh-up-") as folder:
        state = Path(folder) / "state"
        up = ("up", "--detach", "--models", models, "--engine", "sim", "--state-dir", state)
        done = redmesh(*up, "--port", str(free_ports(2)), timeout_s=120)
        try:
            assert done.code == 0, done
            commands = _pasted(done.out.split("redmesh is ready", 1)[1])
            curls = [line for line in commands if line.startswith("curl")]
            assert len(curls) == 4
            for line in curls:
                answer = _bash(f"set -e; {line} --fail-with-body --silent")
                expected = "data: [DONE]" if "application/json" in line else " "
                assert expected in answer, (line, answer)
            rest = [line for line in commands if not line.startswith("curl")]
            assert len(rest) >= 5
            looks = [line for line in rest if " down " not in line]
            assert "ReplicaReady" in _bash("set -e\n" + "\n".join(looks))
        finally:
            assert redmesh("down", "--state-dir", state, timeout_s=120).code == 0


def _bash(script: str) -> str:
    done = subprocess.run(
        ["/bin/bash", "-c", script],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, (script, done.stdout, done.stderr)
    return done.stdout


def test_ctrl_c_drains_and_leaves_nothing(models: Path) -> None:
    """After SIGINT `up` stops all that it started, removes its run files and exits with 0."""
    with _foreground(models) as up:
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(GONE_S) == 0, up.text
        assert not left_behind(up.mark)
        assert up.text.rstrip().endswith("stopped")


def test_an_up_that_is_killed_takes_its_mesh_along(models: Path) -> None:
    """A foreground `up` that dies by SIGKILL leaves no process: its supervisor stops the rest."""
    with _foreground(models) as up:
        up.process.kill()
        up.process.wait(10)
        up.wait_nothing_left()


def test_down_ends_a_foreground_mesh(models: Path) -> None:
    """`redmesh down` from another terminal ends a foreground mesh; its `up` exits with 0."""
    with _foreground(models) as up:
        arguments = up.process.args
        assert isinstance(arguments, list)
        state = str(arguments[arguments.index("--state-dir") + 1])
        assert redmesh("down", "--state-dir", state, timeout_s=120).code == 0
        assert up.process.wait(30) == 0
        assert not left_behind(up.mark)


def test_down_cleans_up_after_a_killed_supervisor(models: Path) -> None:
    """With supervisor, agent and Redis all killed, `down` still ends proxies and engines."""
    with start(models) as mesh:
        supervisor = mesh.file().supervisor
        assert supervisor is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        mesh.kill("agent-local-1")
        mesh.kill("redis")
        refused = mesh.redmesh("up", "--models", models, "--engine", "sim", "--detach")
        assert (refused.code, "still run" in refused.err) == (2, True), refused
        done = mesh.redmesh("down", timeout_s=120)
        assert (done.code, done.out) == (0, "stopped; its supervisor had gone before\n")
        assert not left_behind(mesh.mark)


def test_a_killed_redis_comes_back_with_its_data(models: Path) -> None:
    """The supervisor starts Redis again on its port, and the same replica serves on."""
    with start(models) as mesh:
        (before,) = _rids(mesh.redmesh("get", "replicas", "-o", "json").out)
        killed = mesh.kill("redis")
        wait_until_sync(lambda: mesh.pid("redis") not in (0, killed), what="Redis runs again")
        wait_until_sync(
            lambda: _rids(mesh.redmesh("get", "replicas", "-o", "json").out) == [before],
            timeout_s=30,
            interval_s=0.5,
            what="the same replica is READY",
        )


def _rids(listing: str) -> list[str]:
    return re.findall(r'"rid": "([^"]+)"', listing)


def test_a_foreign_redis_is_used_and_left_alone(models: Path) -> None:
    """With --redis-url no Redis is started, and that one is still there after `down`."""
    with redis_server() as url, tempfile.TemporaryDirectory(prefix="redmesh-up-") as folder:
        state = StateDir(Path(folder) / "state")
        up = ("up", "--detach", "--models", models, "--engine", "sim", "--redis-url", url)
        where = ("--state-dir", state.path)
        try:
            done = redmesh(*up, *where, "--port", str(free_ports(2)), timeout_s=120)
            assert done.code == 0, done
            mesh = state.read_mesh()
            assert mesh is not None
            assert "redis" not in mesh.running
        finally:
            assert redmesh("down", *where, timeout_s=120).code == 0
        left = redmesh("get", "deployments", "-o", "json", "--redis-url", url)
        assert '"model": "tiny"' in left.out
