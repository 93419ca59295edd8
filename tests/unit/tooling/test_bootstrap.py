"""The bootstrap on machines that lack things: tried with stand-ins for the machine's programs."""

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

BOOTSTRAP = Path(__file__).resolve().parents[3] / "deploy" / "bootstrap"
REAL_PROGRAMS = ["bash", "cat", "cut", "dirname", "grep", "mktemp", "mkdir", "rm", "ln"]


class Machine:
    """A clone with the bootstrap scripts, and a PATH that holds only what a test puts there."""

    def __init__(self, root: Path) -> None:
        self.clone = root / "clone"
        self.bin = root / "bin"
        self.bin.mkdir()
        shutil.copytree(BOOTSTRAP, self.clone / "deploy" / "bootstrap")
        for name in REAL_PROGRAMS:
            found = shutil.which(name)
            assert found is not None
            (self.bin / name).symlink_to(found)
        self.env: dict[str, str] = {}
        self.has("id", "echo 1000")

    def has(self, name: str, script: str, *, folder: Path | None = None) -> None:
        """Put a program on its PATH, or into another folder."""
        place = (folder or self.bin) / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"#!/bin/sh\n{script}\n")
        place.chmod(place.stat().st_mode | stat.S_IXUSR)

    def runs(self, script: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one of the bootstrap scripts there, as nobody in particular."""
        path = self.clone / "deploy" / "bootstrap" / script
        return subprocess.run(
            [str(self.bin / "bash"), str(path), *words],
            env={"PATH": str(self.bin), "TMPDIR": str(self.clone), "SYSTEM_PYTHON": "", **self.env},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Return a machine without Python, where we are not root."""
    return Machine(tmp_path)


def wanted_uv() -> str:
    """Return the version of uv that the bootstrap pins."""
    for line in (BOOTSTRAP / "uv.sh").read_text().splitlines():
        if line.startswith("version="):
            return line.removeprefix("version=")
    raise AssertionError("uv.sh names no version")


def test_without_python_it_says_what_to_install(machine: Machine) -> None:
    """Without a Python 3.11 on PATH the bootstrap ends with a sentence that names the remedy."""
    machine.has("python3", "exit 1")
    ended = machine.runs("uv.sh")
    assert ended.returncode == 1
    assert "no Python 3.11 or newer on PATH" in ended.stderr


def test_a_python_without_venv_and_pip_needs_a_hand(machine: Machine) -> None:
    """With neither venv nor pip nor root, the bootstrap names the package to install."""
    machine.has("python3", 'case "$1" in -c) exit 0 ;; *) echo "no such module"; exit 1 ;; esac')
    ended = machine.runs("uv.sh")
    assert ended.returncode == 1
    assert "apt-get install python3-venv" in ended.stderr
    assert "no such module" in ended.stderr
    assert not (machine.clone / ".tools").exists()


def test_pip_alone_is_enough(machine: Machine) -> None:
    """A Python with pip but without venv gets uv by `pip --target`, leaving that Python alone."""
    machine.has(
        "python3",
        f"""case "$*" in
  -c*|"-m pip --version") exit 0 ;;
  "-m pip install"*--target*)
    while [ "$1" != --target ]; do shift; done
    mkdir -p "$2/bin"
    printf '#!/bin/sh\\necho uv {wanted_uv()}\\n' > "$2/bin/uv"
    {shutil.which("chmod")} +x "$2/bin/uv" ;;
  *) exit 1 ;;
esac""",
    )
    ended = machine.runs("uv.sh")
    assert ended.returncode == 0, ended.stderr
    assert (machine.clone / ".tools" / "bin" / "uv").exists()


def test_the_systems_python_comes_first(machine: Machine, tmp_path: Path) -> None:
    """It is used before that on PATH, unless PYTHON names another, which must be new enough."""
    machine.has("python3", "exit 0")
    machine.has("python3", "exit 0", folder=tmp_path / "system")
    machine.has("old", "exit 1")
    (machine.clone / "deploy" / "bootstrap" / "say.sh").write_text(
        '. "$(dirname "$0")/common.sh"\nfind_python\n'
    )
    machine.env = {"SYSTEM_PYTHON": str(tmp_path / "system" / "python3")}
    assert machine.runs("say.sh").stdout.strip() == machine.env["SYSTEM_PYTHON"]
    machine.env["PYTHON"] = "python3"
    assert machine.runs("say.sh").stdout.strip() == str(machine.bin / "python3")
    machine.env["PYTHON"] = "old"
    ended = machine.runs("say.sh")
    assert ended.returncode == 1
    assert "PYTHON=old does not run, or is older than 3.11" in ended.stderr


def test_nothing_is_done_twice(machine: Machine) -> None:
    """Where the wanted uv is already in .tools, the bootstrap does nothing and says nothing."""
    machine.has("uv", f"echo uv {wanted_uv()}", folder=machine.clone / ".tools" / "bin")
    ended = machine.runs("uv.sh")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_missing_system_packages_are_named(machine: Machine) -> None:
    """Without root, a missing program is an error that names its Debian package, never a skip."""
    machine.has("redis-server", "exit 0")
    ended = machine.runs("system.sh", "tests")
    assert ended.returncode == 1
    assert "as root: apt-get install lua-check" in ended.stderr
