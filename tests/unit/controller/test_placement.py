import msgspec
import pytest

from services.controller.placement import Occupant, Placement, Site, Unplaceable, place
from shared.models.deployment import DeploymentSpec, EngineKind, EngineSpec, ResourceSpec
from shared.models.host import Host
from tests.unit.controller.fleet import GIB, host


def spec(
    *, kind: EngineKind = EngineKind.VLLM, gpus: int = 0, gpu_gib: int = 0, fallback: bool = False
) -> DeploymentSpec:
    """Make a deployment with these needs."""
    return DeploymentSpec(
        name="m",
        engine=EngineSpec(kind=kind, model="w"),
        resources=ResourceSpec(
            gpus=gpus, gpu_memory_bytes=gpu_gib * GIB, cpu_fallback=fallback, memory_bytes=4 * GIB
        ),
    )


def occupant(
    name: str, model: str = "m", *, gpus: tuple[int, ...] = (), gpu_gib: int = 0, gib: int = 1
) -> Occupant:
    """Make a replica that stands on `name`."""
    return Occupant(
        host=name,
        model=model,
        kind=EngineKind.VLLM,
        resources=ResourceSpec(
            gpus=len(gpus), gpu_memory_bytes=gpu_gib * GIB, memory_bytes=gib * GIB
        ),
        gpu_indices=gpus,
    )


def sites(*hosts: Host) -> list[Site]:
    """Open these hosts for placement."""
    return [Site(host=h) for h in hosts]


def test_replicas_of_a_model_are_spread() -> None:
    """The host with the fewest replicas of the model gets the next one."""
    found = place(spec(), sites(host("a"), host("b")), [occupant("a"), occupant("b", "other")])
    assert found == Placement(host="b")


def test_an_equal_choice_is_always_the_same() -> None:
    """Two leaders that see the same world choose the same host."""
    assert place(spec(), sites(host("b"), host("a")), []) == Placement(host="a")


def test_whole_gpus_are_not_shared() -> None:
    """A replica that names no GPU memory takes its GPUs whole."""
    found = place(spec(gpus=1), sites(host("a", gpus=2)), [occupant("a", gpus=(0,))])
    assert found == Placement(host="a", gpu_indices=(1,))
    full = place(spec(gpus=2), sites(host("a", gpus=2)), [occupant("a", gpus=(0,))])
    assert full == Unplaceable(why="a: 1 of 2 GPUs free")


def test_gpus_are_shared_by_memory() -> None:
    """Replicas that reserve GPU memory share a GPU, the fullest that still fits first."""
    here = [occupant("a", "x", gpus=(1,), gpu_gib=40)]
    found = place(spec(gpus=1, gpu_gib=30), sites(host("a", gpus=2)), here)
    assert found == Placement(host="a", gpu_indices=(1,))
    found = place(spec(gpus=1, gpu_gib=50), sites(host("a", gpus=2)), here)
    assert found == Placement(host="a", gpu_indices=(0,))


def test_a_shared_gpu_is_no_whole_one() -> None:
    """A replica that wants a GPU for itself gets none that somebody uses."""
    here = [occupant("a", "x", gpus=(0,), gpu_gib=1)]
    assert isinstance(place(spec(gpus=1), sites(host("a", gpus=1)), here), Unplaceable)


def test_falling_back_to_the_cpu_without_any_gpu() -> None:
    """With `cpu_fallback` a fleet without GPUs serves on CPU; without it, it does not."""
    assert place(spec(gpus=1, fallback=True), sites(host("a")), []) == Placement(host="a")
    assert isinstance(place(spec(gpus=1), sites(host("a")), []), Unplaceable)


def test_a_busy_gpu_does_not_turn_into_a_slow_cpu() -> None:
    """While the fleet knows a host with such GPUs, even a full or closed one, none falls back."""
    gpu = Site(host=host("g", gpus=1), closed="cordoned")
    found = place(spec(gpus=1, fallback=True), [gpu, Site(host=host("c"))], [])
    assert found == Unplaceable(why="c: 0 of 1 GPUs free; g: cordoned")


def test_other_kinds_need_no_gpu_and_no_memory() -> None:
    """A simulated engine of a GPU model is placed anywhere."""
    small = msgspec.structs.replace(host("a"), memory_bytes=1)
    found = place(spec(kind=EngineKind.SIM, gpus=4), sites(small), [])
    assert found == Placement(host="a")


def test_cpu_replicas_leave_gpu_hosts_alone_if_they_can() -> None:
    """A replica without need of a GPU prefers a host that has none."""
    assert place(spec(), sites(host("a", gpus=1), host("b")), []) == Placement(host="b")


@pytest.mark.parametrize(
    ("site", "why"),
    [
        (Site(host=host("a"), closed="cordoned"), "a: cordoned"),
        (Site(host=host("a", max_replicas=0)), "a: full (0 of 0 replicas)"),
        (
            Site(host=msgspec.structs.replace(host("a"), engines=("sim",))),
            "a: runs no vllm engines (it runs sim)",
        ),
        (
            Site(host=msgspec.structs.replace(host("a"), memory_bytes=3 * GIB)),
            "a: 3.0 GiB of memory left, 4.0 GiB needed",
        ),
    ],
)
def test_refusals_name_what_is_missing(site: Site, why: str) -> None:
    """Each host that does not fit says why."""
    assert place(spec(), [site], []) == Unplaceable(why=why)


def test_memory_of_those_already_there_counts() -> None:
    """Memory that replicas on the host have been promised is not promised again."""
    here = [occupant("a", "x", gib=62)]
    assert isinstance(place(spec(), sites(host("a")), here), Unplaceable)


def test_no_host_at_all() -> None:
    """Without any host the reason tells what to start."""
    found = place(spec(), [], [])
    assert isinstance(found, Unplaceable)
    assert "redmesh agent" in found.why
