"""The process: flags, a taken port, the line it says, and how SIGTERM ends it."""

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from services.simengine.arguments import parse
from services.simengine.main import main
from tests.support.waiting import wait_until_sync
from tests.unit.simengine.driving import EngineProcess

Spawn = Callable[..., EngineProcess]


def test_unknown_and_impossible_flags_are_told_with_exit_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each mistake names the flag and ends with 2, without a traceback."""
    for argv, told in (
        (["--model", "m", "--no-such-flag"], "--no-such-flag"),
        ([], "--model"),
        (["--model", "m", "--port", "99999"], "--port"),
        (["--model", "m", "--max-num-seqs", "0"], "--max-num-seqs"),
        (["--model", "m", "--kv-cache-memory-bytes", "16384"], "--kv-cache-memory-bytes"),
        (["--model", "m", "--fault", "boom"], "boom"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert told in error
        assert "Traceback" not in error


def test_the_flags_an_agent_passes_are_taken() -> None:
    """Flags of vLLM parse, those without an effect here too, and bytes become KV tokens."""
    options = parse(
        [
            *("--model", "/m", "--served-model-name", "a", "b", "--host", "127.0.0.1"),
            *("--port", "1", "--max-model-len", "512", "--dtype", "auto", "--quantization", "awq"),
            *("--enforce-eager", "--chat-template", "x.jinja", "--enable-prefix-caching"),
            *("--kv-cache-memory-bytes", "134217728", "--shutdown-timeout", "30", "--seed", "0"),
        ],
        {"VLLM_API_KEY": "k", "REDMESH_SIM_FAULTS": "freeze slow:factor=2"},
    )
    assert options.names == ("a", "b")
    assert options.limits.kv_tokens == 8192
    assert options.api_key == "k"
    assert [order.kind for order in options.faults] == ["freeze", "slow"]


def test_a_taken_port_is_one_clear_line_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the address and the remedy."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--model", "m", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"127.0.0.1:{port}" in error
    assert "--port" in error


class Reader:
    """Reads a long stream in a thread, so that signals can be sent meanwhile."""

    def __init__(self, url: str, tokens: int) -> None:
        self.lines: list[str] = []
        self.error: Exception | None = None
        self._body = {"prompt": "a", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        self._url = url
        self.thread = threading.Thread(target=self._read)
        self.thread.start()
        wait_until_sync(lambda: len(self.lines) > 2, what="the stream flows")

    def _read(self) -> None:
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body) as response:
                for line in filter(None, response.iter_lines()):
                    self.lines.append(line)
        except httpx.HTTPError as error:
            self.error = error


def test_sigterm_with_a_timeout_finishes_what_is_in_flight(spawn: Spawn) -> None:
    """The stream ends with [DONE], new requests are still served meanwhile, exit is 0."""
    engine = spawn("--shutdown-timeout", "30", "--step-ms", "5")
    reader = Reader(engine.url, 200)
    engine.process.send_signal(signal.SIGTERM)
    assert httpx.get(f"{engine.url}/health").status_code == 200
    answer = httpx.post(f"{engine.url}/v1/completions", json={"prompt": "a", "max_tokens": 2})
    assert answer.status_code == 200
    assert engine.process.wait(timeout=20) == 0
    reader.thread.join(timeout=10)
    assert reader.error is None
    assert reader.lines[-1] == "data: [DONE]"


def test_a_drain_ends_at_its_timeout(spawn: Spawn) -> None:
    """A stream longer than the timeout is cut, never ended as if it were whole."""
    engine = spawn("--shutdown-timeout", "0.3", "--step-ms", "20")
    reader = Reader(engine.url, 4000)
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(timeout=10) == 0
    reader.thread.join(timeout=10)
    assert isinstance(reader.error, httpx.RemoteProtocolError)
    assert reader.lines[-1] != "data: [DONE]"


def test_sigterm_without_a_timeout_ends_at_once(spawn: Spawn) -> None:
    """The default timeout is 0: no waiting for streams."""
    engine = spawn("--step-ms", "20")
    reader = Reader(engine.url, 4000)
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(timeout=5) == 0
    reader.thread.join(timeout=10)
    assert reader.error is not None


def test_an_engine_that_is_never_ready_holds_its_port_and_refuses(spawn: Spawn) -> None:
    """Connections are refused, no line is said, and SIGTERM still ends it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    engine = spawn("--never-ready", "--port", str(port), listening=False)

    def bound() -> bool:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return True
        return False

    wait_until_sync(bound, what="the port is taken")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")
    engine.process.send_signal(signal.SIGTERM)
    wait_until_sync(lambda: engine.process.poll() is not None, what="it ends")


def test_the_module_runs_as_a_program() -> None:
    """`python -m services.simengine` is what an agent starts."""
    done = subprocess.run(
        [sys.executable, "-m", "services.simengine", "--help"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0
    assert "--max-num-queued-reqs" in done.stdout
