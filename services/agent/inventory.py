"""What this host has: GPUs by NVML, CPUs and memory within the limits of its control group.

A host without NVIDIA's driver has no GPUs; that is no error. Looked up once, at start.
"""

import contextlib
import importlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

import psutil

from services.agent.launch import usable
from services.agent.settings import AgentSettings, parse_gpus
from shared.models.deployment import EngineKind
from shared.models.host import Gpu, Host

CGROUP: Final = Path("/sys/fs/cgroup")


def look(settings: AgentSettings, started_ms: int) -> Host:
    """Describe this host."""
    engines = [EngineKind.SIM, EngineKind.EXTERNAL]
    if usable(settings.engine_python_path):
        engines.insert(0, EngineKind.VLLM)
    wanted = parse_gpus(settings.gpus)
    gpus = () if wanted == frozenset() else find_gpus()
    return Host(
        host=settings.host_name,
        address=settings.address,
        cpus=cpus(CGROUP),
        memory_bytes=memory_bytes(CGROUP),
        gpus=tuple(gpu for gpu in gpus if wanted is None or gpu.index in wanted),
        engines=tuple(kind.value for kind in engines),
        max_replicas=settings.max_replicas,
        agent_started_ms=started_ms,
        drills_allowed=settings.drills_allowed,
    )


def cpus(cgroup: Path) -> float:
    """Count the CPUs that this process may use: its affinity, or its group's quota if smaller."""
    allowed = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        if quota != "max":
            return min(allowed, int(quota) / int(period))
    return allowed


def memory_bytes(cgroup: Path) -> int:
    """Return the main memory that this host may use: all of it, or its group's limit if smaller."""
    total = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            return min(total, int(limit))
    return total


def find_gpus() -> tuple[Gpu, ...]:
    """List the NVIDIA GPUs of this host; none where the driver or the library is missing."""
    with _nvml() as nvml:
        if nvml is None:
            return ()
        return tuple(_describe(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))


def _describe(nvml: Any, index: int) -> Gpu:  # noqa: ANN401 - the library has no types
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    return Gpu(
        index=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
    )


@contextlib.contextmanager
def _nvml() -> Generator[Any]:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        yield None
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
