"""Command lines and environments: what vLLM is told, and what it must never see."""

from pathlib import Path

import msgspec
import pytest

from services.agent.launch import (
    CPU_KV_CACHE_BYTES,
    MARK_VARIABLE,
    ModelFiles,
    Surroundings,
    find_files,
    plan_launch,
)
from shared.errors import EngineError
from shared.models.deployment import (
    DeploymentSpec,
    EngineKind,
    EngineSpec,
    Quantization,
    ResourceSpec,
)
from shared.models.order import Order, OrderAction
from shared.secret import Secret, replica_api_key

SECRET = Secret("fleet")
HOST = Surroundings(
    engine_python=Path("/engine/bin/python"),
    engine_python_usable=True,
    engine_host="127.0.0.1",
    fleet_secret=SECRET,
    environ={
        "PATH": "/bin",
        "HF_TOKEN": "hub",
        "REDMESH_FLEET_SECRET": "fleet",
        "REDMESH_REDIS_URL": "redis://:pw@h",
        "VLLM_API_KEY": "stale",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "PYTHONPATH": "/ours",
        "VIRTUAL_ENV": "/ours",
    },
    gpu_memory_bytes={0: 80 << 30, 1: 40 << 30},
    source_root=Path("/src"),
)
LOCAL = ModelFiles(model="/weights", local=True)


def order(
    engine: EngineSpec, resources: ResourceSpec | None = None, gpus: tuple[int, ...] = ()
) -> Order:
    """Make an order for `engine`."""
    spec = DeploymentSpec(
        name="m", aliases=("org/m",), engine=engine, resources=resources or ResourceSpec(cpus=2.0)
    )
    return Order(
        rid="m-1",
        model="m",
        gen=7,
        action=OrderAction.RUN,
        revision="r",
        spec=spec,
        gpu_indices=gpus,
    )


def flags(command: tuple[str, ...]) -> dict[str, list[str]]:
    """Read a command line as flag → values."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in command:
        if word.startswith("--"):
            name = word
            found[name] = []
        elif name:
            found[name].append(word)
    return found


def test_vllm_on_cpu_is_told_everything_it_needs() -> None:
    """Names, address, limits, a shutdown timeout above 0 and a small KV cache are always given."""
    engine = EngineSpec(model="/weights", max_model_len_tokens=512, shutdown_timeout_s=0)
    launch = plan_launch(order(engine), 18001, LOCAL, HOST, "mark")
    assert launch.command[:3] == (
        "/engine/bin/python",
        "-m",
        "vllm.entrypoints.openai.api_server",
    )
    given = flags(launch.command)
    assert given["--model"] == ["/weights"]
    assert given["--served-model-name"] == ["m", "org/m"]
    assert (given["--host"], given["--port"]) == (["127.0.0.1"], ["18001"])
    assert given["--max-model-len"] == ["512"]
    assert given["--max-num-queued-reqs"] == ["512"]
    assert given["--shutdown-timeout"] == ["1"]
    assert given["--kv-cache-memory-bytes"] == [str(CPU_KV_CACHE_BYTES)]
    assert "--enforce-eager" in given
    assert "--quantization" not in given
    environment = launch.environment
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment


@pytest.mark.parametrize("kind", [EngineKind.VLLM, EngineKind.SIM])
def test_no_secret_of_the_agent_reaches_an_engine(kind: EngineKind) -> None:
    """An engine gets its own derived key and mark by environment; REDMESH_ stays with the agent."""
    launch = plan_launch(order(EngineSpec(kind=kind)), 18001, LOCAL, HOST, "mark")
    key = replica_api_key(SECRET, "m-1", 7)
    assert launch.environment["VLLM_API_KEY"] == key
    assert launch.environment[MARK_VARIABLE] == "mark"
    assert launch.environment["HF_TOKEN"] == "hub"
    assert not [name for name in launch.environment if name.startswith("REDMESH_")]
    assert "VIRTUAL_ENV" not in launch.environment
    assert launch.environment.get("PYTHONPATH") == ("/src" if kind is EngineKind.SIM else None)
    assert not [word for word in launch.command if key in word or "fleet" in word]


@pytest.mark.parametrize(
    ("quantization", "flag"),
    [
        (Quantization.NONE, None),
        (Quantization.AWQ, ["awq"]),
        (Quantization.GPTQ, ["gptq"]),
        (Quantization.COMPRESSED_TENSORS, ["compressed-tensors"]),
        (Quantization.INT8, ["int8_per_channel_weight_only"]),
        (Quantization.FP8, ["fp8"]),
        (Quantization.BITSANDBYTES, ["bitsandbytes"]),
    ],
)
def test_quantization_is_said_in_words_of_vllm(
    quantization: Quantization, flag: list[str] | None
) -> None:
    """Each quantization field maps to the name that vLLM 0.32 knows."""
    launch = plan_launch(
        order(EngineSpec(model="/w", quantization=quantization)), 1, LOCAL, HOST, "mark"
    )
    assert flags(launch.command).get("--quantization") == flag


def test_quantized_checkpoint_is_left_to_vllm() -> None:
    """`int8` of a checkpoint that is quantized already adds no flag: vLLM would refuse it."""
    files = msgspec.structs.replace(LOCAL, quantized_as="compressed-tensors")
    engine = EngineSpec(model="/w", quantization=Quantization.INT8)
    assert "--quantization" not in plan_launch(order(engine), 1, files, HOST, "mark").command


def test_gpus_are_named_and_shared_as_ordered() -> None:
    """The order's GPUs alone are visible; memory that is named becomes the engine's share."""
    resources = ResourceSpec(gpus=2, gpu_memory_bytes=10 << 30)
    launch = plan_launch(order(EngineSpec(model="/w"), resources, (0, 1)), 1, LOCAL, HOST, "mark")
    given = flags(launch.command)
    assert launch.environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert given["--tensor-parallel-size"] == ["2"]
    assert given["--gpu-memory-utilization"] == ["0.2500"]
    assert "--enforce-eager" not in given
    assert "--kv-cache-memory-bytes" not in given
    assert "VLLM_CPU_OMP_THREADS_BIND" not in launch.environment


def test_declared_arguments_and_environment_come_last() -> None:
    """What the operator adds is passed as it is, and may set the KV cache by environment."""
    engine = EngineSpec(model="/w", args=("--seed", "3"), env={"VLLM_CPU_KVCACHE_SPACE": "1"})
    launch = plan_launch(order(engine), 1, LOCAL, HOST, "mark")
    assert launch.command[-2:] == ("--seed", "3")
    assert launch.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "--kv-cache-memory-bytes" not in launch.command


def test_hub_model_may_use_the_hub() -> None:
    """Only a model that lies on this host is served offline."""
    files = ModelFiles(model="org/m", local=False)
    launch = plan_launch(order(EngineSpec(model="org/m")), 1, files, HOST, "mark")
    assert "HF_HUB_OFFLINE" not in launch.environment


def test_missing_engine_environment_names_the_remedy() -> None:
    """Without vLLM the error says which path is no executable and which variable to set."""
    host = msgspec.structs.replace(HOST, engine_python_usable=False)
    with pytest.raises(EngineError, match=r"/engine/bin/python.*REDMESH_ENGINE_PYTHON"):
        plan_launch(order(EngineSpec(model="/w")), 1, LOCAL, host, "mark")


@pytest.mark.parametrize("model", ["", "/no/such", "./no", "a/b/c"])
def test_missing_model_is_known_before_the_start(model: str) -> None:
    """A path that is no folder, or nothing at all, is refused at once."""
    with pytest.raises(EngineError, match=r"engine\.model"):
        find_files(EngineSpec(model=model))


def test_missing_template_is_known_before_the_start() -> None:
    """A chat template that is no file is refused at once."""
    with pytest.raises(EngineError, match=r"engine\.chat_template"):
        find_files(EngineSpec(model="org/m", chat_template="/no/such.jinja"))


def test_local_files_are_found(tmp_path: Path) -> None:
    """A folder is found with its own quantization; what is broken in it is for vLLM to say."""
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    spec = EngineSpec(model=str(tmp_path), chat_template=str(template))
    found = find_files(spec)
    assert (found.model, found.local, found.quantized_as) == (str(tmp_path), True, "gptq")
    assert found.chat_template == str(template)
    (tmp_path / "config.json").write_text("[]")
    assert find_files(spec).quantized_as is None
    assert find_files(EngineSpec(model="org/m")) == ModelFiles(model="org/m", local=False)
