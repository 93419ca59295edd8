"""Where a replica goes: hosts × needs → a host and its GPUs, or the reason why not. Pure.

Hard rules: the host's agent is alive and can run the kind of engine, nobody cordoned the host,
it has a slot left, and a `vllm` replica finds its GPUs and its memory there. GPUs are taken whole,
or shared by replicas that say how much memory they reserve. CPU cores refuse nothing: they only
balance. Among the hosts that fit, spread wins: fewest replicas of the same model, then no GPU
wasted on a replica without need of one, then the least used.
"""

from collections.abc import Iterable, Sequence

import msgspec

from shared.models.deployment import DeploymentSpec, EngineKind, ResourceSpec
from shared.models.host import Gpu, Host


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """A host as a place for replicas; `closed` says why it takes none, if it does not."""

    host: Host
    closed: str = ""


class Occupant(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that takes room on a host."""

    host: str
    model: str
    kind: EngineKind
    resources: ResourceSpec
    gpu_indices: tuple[int, ...] = ()


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """A place that fits; no GPUs means the engine runs on the CPU."""

    host: str
    gpu_indices: tuple[int, ...] = ()


class Unplaceable(msgspec.Struct, frozen=True, kw_only=True):
    """No place fits; `why` tells an operator what is missing where."""

    why: str


def place(
    spec: DeploymentSpec, sites: Iterable[Site], occupants: Sequence[Occupant]
) -> Placement | Unplaceable:
    """Choose a host for one more replica of `spec`."""
    sites = sorted(sites, key=lambda site: site.host.host)
    if not sites:
        return Unplaceable(why="no agent has reported a host yet: start one with `redmesh agent`")
    gpus = gpus_needed(spec, [site.host for site in sites])
    refusals: list[str] = []
    found: list[tuple[tuple[float, ...], Placement]] = []
    for site in sites:
        here = [occupant for occupant in occupants if occupant.host == site.host.host]
        fit = site.closed or _fit(spec, gpus, site.host, here)
        if isinstance(fit, str):
            refusals.append(f"{site.host.host}: {fit}")
            continue
        rank = (
            float(sum(occupant.model == spec.name for occupant in here)),
            float(gpus == 0 and bool(site.host.gpus)),
            sum(o.resources.cpus for o in here) / max(site.host.cpus, 0.001),
            float(len(here)),
        )
        found.append((rank, Placement(host=site.host.host, gpu_indices=fit)))
    if not found:
        return Unplaceable(why="; ".join(refusals))
    return min(found, key=lambda entry: (entry[0], entry[1].host))[1]


def gpus_needed(spec: DeploymentSpec, hosts: Iterable[Host]) -> int:
    """Count the GPUs one replica takes; none if it may fall back and no host has such GPUs.

    Full, cordoned and silent hosts count here: a busy GPU must not turn into a slow CPU.
    """
    need = spec.resources
    if spec.engine.kind is not EngineKind.VLLM or need.gpus == 0:
        return 0
    if need.cpu_fallback and not any(
        _runs(host, spec.engine.kind) and len(_large_enough(host, need)) >= need.gpus
        for host in hosts
    ):
        return 0
    return need.gpus


def choose_gpus(
    need: ResourceSpec, gpus: int, host: Host, here: Sequence[Occupant]
) -> tuple[int, ...] | str:
    """Choose `gpus` GPUs of `host` for one more replica, the fullest that fit first.

    Filling shared GPUs before opening new ones keeps whole GPUs free for replicas that need them.
    """
    if gpus == 0:
        return ()
    free = _free_bytes(host, here)
    fitting = [
        gpu
        for gpu in _large_enough(host, need)
        if (
            free[gpu.index] >= need.gpu_memory_bytes
            if need.gpu_memory_bytes
            else free[gpu.index] == gpu.memory_bytes
        )
    ]
    if len(fitting) < gpus:
        return f"{len(fitting)} of {gpus} GPUs free"
    chosen = sorted(fitting, key=lambda gpu: (free[gpu.index], gpu.index))[:gpus]
    return tuple(sorted(gpu.index for gpu in chosen))


def _fit(
    spec: DeploymentSpec, gpus: int, host: Host, here: Sequence[Occupant]
) -> tuple[int, ...] | str:
    kind = spec.engine.kind
    if not _runs(host, kind):
        return f"runs no {kind} engines (it runs {', '.join(host.engines) or 'none'})"
    if len(here) >= host.max_replicas:
        return f"full ({len(here)} of {host.max_replicas} replicas)"
    if kind is EngineKind.VLLM:
        need = spec.resources
        if gpus == 0 and need.gpus > 0 and host.gpus:
            return "has GPUs, but not such as this model needs"
        taken = sum(o.resources.memory_bytes for o in here if o.kind is EngineKind.VLLM)
        free = host.memory_bytes - taken
        if need.memory_bytes > free:
            return f"{_gib(max(free, 0))} of memory left, {_gib(need.memory_bytes)} needed"
    return choose_gpus(spec.resources, gpus, host, here)


def _runs(host: Host, kind: EngineKind) -> bool:
    return kind.value in host.engines


def _large_enough(host: Host, need: ResourceSpec) -> list[Gpu]:
    return [gpu for gpu in host.gpus if gpu.memory_bytes >= need.gpu_memory_bytes]


def _free_bytes(host: Host, here: Sequence[Occupant]) -> dict[int, int]:
    free = {gpu.index: gpu.memory_bytes for gpu in host.gpus}
    for occupant in here:
        for index in occupant.gpu_indices:
            if index in free:
                taken = occupant.resources.gpu_memory_bytes or free[index]
                free[index] = max(0, free[index] - taken)
    return free


def _gib(amount_bytes: int) -> str:
    return f"{amount_bytes / (1 << 30):.1f} GiB"
