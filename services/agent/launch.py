"""From an order to a command line and an environment. Pure: what it must know of the disk is told.

Two rules keep engines safe to run. A key reaches an engine by environment, never by argument,
where every user of the host could read it. And nothing of the agent's own configuration (its
REDMESH_ variables hold the fleet secret and the Redis password) reaches an engine at all.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from shared.errors import EngineError
from shared.models.deployment import EngineKind, EngineSpec, Quantization
from shared.models.order import Order
from shared.secret import Secret, replica_api_key
from shared.settings import PREFIX

MARK_VARIABLE: Final = "MESH_REPLICA_MARK"
"""Marks every process of an engine's tree, so that the tree is found when its pid was not kept."""

CPU_KV_CACHE_BYTES: Final = 128 << 20
"""KV cache of an engine on CPU that declares none: it is resident at once, so it is kept small."""

QUANTIZATION_FLAGS: Final[Mapping[Quantization, str | None]] = {
    Quantization.NONE: None,
    Quantization.AWQ: "awq",
    Quantization.GPTQ: "gptq",
    Quantization.COMPRESSED_TENSORS: "compressed-tensors",
    Quantization.INT8: "int8_per_channel_weight_only",
    Quantization.FP8: "fp8",
    Quantization.BITSANDBYTES: "bitsandbytes",
}
"""What vLLM calls each kind. `int8` is quantized while loading: vLLM 0.32 does so for the experts
of mixture models only, and leaves the layers of dense models as they are."""

ONLINE: Final = frozenset({Quantization.INT8, Quantization.FP8})
"""Quantized by vLLM while loading, unless the checkpoint is quantized already."""

_DROPPED: Final = frozenset(
    {
        "CUDA_VISIBLE_DEVICES",
        "PYTHONHOME",
        "PYTHONPATH",
        "VIRTUAL_ENV",
        "VLLM_API_KEY",
        MARK_VARIABLE,
    }
)


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What a launch needs to know of the host, looked up beforehand."""

    engine_python: Path
    engine_python_usable: bool
    """It exists and may be executed."""
    engine_host: str
    fleet_secret: Secret
    environ: Mapping[str, str]
    """The agent's own environment; filtered before an engine sees it."""
    gpu_memory_bytes: Mapping[int, int] = msgspec.field(default_factory=dict[int, int])
    """Memory of each GPU by index."""
    source_root: Path
    """Folder that holds `services`: what makes `-m services.simengine` importable anywhere."""


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of an order's files on this host."""

    model: str
    """Absolute path when the model is a folder here; else the hub id as given."""
    local: bool
    quantized_as: str | None = None
    """`quant_method` of the checkpoint's own configuration, if it has one."""
    chat_template: str | None = None


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """How to start one engine. `environment` holds the engine's key: never log or store it."""

    command: tuple[str, ...]
    environment: dict[str, str]


def find_files(spec: EngineSpec) -> ModelFiles:
    """Look up the model and the chat template of `spec`; raise `EngineError` when one is missing.

    A model that looks like a path must be a folder here. Anything else is a hub id.
    """
    template = spec.chat_template
    if template is not None:
        path = Path(template).expanduser().absolute()
        if not path.is_file():
            raise EngineError(
                f"engine.chat_template {template!r} is not a file on this host: "
                "put it there or correct the path"
            )
        template = str(path)
    if spec.kind is EngineKind.EXTERNAL:
        return ModelFiles(model=spec.model, local=False)
    if not spec.model and spec.kind is EngineKind.VLLM:
        raise EngineError("engine.model is empty: give a hub id or the path of a folder of weights")
    path = Path(spec.model).expanduser().absolute()
    if spec.model and path.is_dir():
        return ModelFiles(
            model=str(path),
            local=True,
            quantized_as=_quantization_of(path / "config.json"),
            chat_template=template,
        )
    if spec.kind is EngineKind.VLLM and _looks_like_path(spec.model):
        raise EngineError(
            f"engine.model {spec.model!r} is not a folder on this host: "
            "put the weights there or correct the path"
        )
    return ModelFiles(model=spec.model, local=False, chat_template=template)


def plan_launch(
    order: Order, port: int, files: ModelFiles, host: Surroundings, mark: str
) -> Launch:
    """Build the command and the environment of `order`'s engine on `port`.

    Raises `EngineError` for an engine that cannot run here.
    """
    kind = order.spec.engine.kind
    if kind is EngineKind.EXTERNAL:
        raise EngineError("an external engine is not started: it runs already")
    if kind is EngineKind.VLLM and not host.engine_python_usable:
        raise EngineError(
            f"engine_python {str(host.engine_python)!r} is not an executable: install vLLM there "
            "(`make engine`) or set REDMESH_ENGINE_PYTHON"
        )
    python = str(host.engine_python) if kind is EngineKind.VLLM else sys.executable
    module = (
        "vllm.entrypoints.openai.api_server" if kind is EngineKind.VLLM else "services.simengine"
    )
    command = [python, "-m", module, *_arguments(order, port, files, host)]
    if kind is EngineKind.VLLM:
        command += _vllm_arguments(order, files, host)
    command += order.spec.engine.args
    return Launch(command=tuple(command), environment=_environment(order, files, host, mark))


def _arguments(order: Order, port: int, files: ModelFiles, host: Surroundings) -> list[str]:
    spec, engine = order.spec, order.spec.engine
    arguments = ["--model", files.model or spec.name]
    arguments += ["--served-model-name", spec.name, *spec.aliases]
    arguments += ["--host", host.engine_host, "--port", str(port)]
    arguments += ["--runner", engine.runner]
    arguments += ["--max-num-queued-reqs", str(engine.max_queued_requests)]
    # Without a timeout vLLM answers SIGTERM by hanging the streams that are in flight.
    arguments += ["--shutdown-timeout", str(max(1, engine.shutdown_timeout_s))]
    if engine.max_model_len_tokens is not None:
        arguments += ["--max-model-len", str(engine.max_model_len_tokens)]
    if engine.max_num_seqs is not None:
        arguments += ["--max-num-seqs", str(engine.max_num_seqs)]
    if files.chat_template is not None:
        arguments += ["--chat-template", files.chat_template]
    return arguments


def _vllm_arguments(order: Order, files: ModelFiles, host: Surroundings) -> list[str]:
    engine = order.spec.engine
    arguments = ["--dtype", engine.dtype, "--disable-uvicorn-access-log"]
    flag = QUANTIZATION_FLAGS[engine.quantization]
    # vLLM reads a quantized checkpoint's method by itself, and refuses a flag that differs.
    if flag is not None and not (engine.quantization in ONLINE and files.quantized_as):
        arguments += ["--quantization", flag]
    gpus = len(order.gpu_indices)
    kv_cache_bytes = engine.kv_cache_memory_bytes
    if gpus == 0:
        arguments.append("--enforce-eager")
        if kv_cache_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in engine.env:
            kv_cache_bytes = CPU_KV_CACHE_BYTES
    elif gpus > 1 and not any(a.startswith("--tensor-parallel-size") for a in engine.args):
        arguments += ["--tensor-parallel-size", str(gpus)]
    share = _gpu_share(order, host)
    if share is not None:
        arguments += ["--gpu-memory-utilization", f"{share:.4f}"]
    if kv_cache_bytes is not None:
        arguments += ["--kv-cache-memory-bytes", str(kv_cache_bytes)]
    return arguments


def _gpu_share(order: Order, host: Surroundings) -> float | None:
    """Return the part of its GPUs' memory that `order` reserves; None when it takes them whole."""
    sizes = [host.gpu_memory_bytes.get(index, 0) for index in order.gpu_indices]
    reserved = order.spec.resources.gpu_memory_bytes
    if not reserved or not sizes or not min(sizes):
        return None
    return min(1.0, reserved / min(sizes))


def _environment(order: Order, files: ModelFiles, host: Surroundings, mark: str) -> dict[str, str]:
    engine = order.spec.engine
    environment = {
        name: value
        for name, value in host.environ.items()
        if not name.startswith(PREFIX) and name not in _DROPPED
    }
    if engine.kind is EngineKind.VLLM:
        environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if files.local:
            environment["HF_HUB_OFFLINE"] = "1"
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(i) for i in order.gpu_indices)
        if not order.gpu_indices:
            threads = max(1, int(order.spec.resources.cpus))
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            environment["OMP_NUM_THREADS"] = str(threads)
        # Set, it would win over --kv-cache-memory-bytes; only the deployment may set it.
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    else:
        environment["PYTHONPATH"] = str(host.source_root)
    environment |= engine.env
    if engine.kv_cache_memory_bytes is not None:
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    environment["VLLM_API_KEY"] = replica_api_key(host.fleet_secret, order.rid, order.gen)
    environment[MARK_VARIABLE] = mark
    return environment


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def _quantization_of(config: Path) -> str | None:
    try:
        content = msgspec.json.decode(config.read_bytes(), type=_ModelConfig)
    except (OSError, msgspec.MsgspecError):
        return None  # vLLM itself says what is wrong with a model's configuration
    found = content.quantization_config
    return found.quant_method if found is not None else None


class _QuantizationConfig(msgspec.Struct, frozen=True):
    quant_method: str | None = None


class _ModelConfig(msgspec.Struct, frozen=True):
    quantization_config: _QuantizationConfig | None = None


def usable(path: Path) -> bool:
    """Tell whether `path` is a file that this user may execute."""
    return path.is_file() and os.access(path, os.X_OK)
