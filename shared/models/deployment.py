"""A deployment: what the operator declares about one model, and what follows from it.

`DeploymentSpec` is the operator's document (one entry of `models` in a models file); its JSON
Schema ships beside this file as `deployments.schema.json`. `Deployment` is that spec as stored,
with its generation. A `revision` names the part of a spec that changes the engine: two specs with
the same revision run the same engine.
"""

import hashlib
from enum import StrEnum

import msgspec


class EngineKind(StrEnum):
    """Who runs the engine."""

    VLLM = "vllm"
    """A vLLM process, started and watched by the agent."""
    SIM = "sim"
    """A simengine process, started and watched by the agent."""
    EXTERNAL = "external"
    """An OpenAI-compatible server that runs already: probed and routed, not started or stopped."""


class Quantization(StrEnum):
    """How the weights are quantized; `none` leaves it to the checkpoint."""

    NONE = "none"
    AWQ = "awq"
    GPTQ = "gptq"
    COMPRESSED_TENSORS = "compressed-tensors"
    INT8 = "int8"
    FP8 = "fp8"
    BITSANDBYTES = "bitsandbytes"


class StreamFailover(StrEnum):
    """Which streams go on from another replica when theirs is lost in mid-stream."""

    AUTO = "auto"
    """`valid`, and `off` for `external` servers, which may know no token ids."""
    VALID = "valid"
    """Every stream that can: greedy and seeded ones exactly as they would have gone on, sampled
    ones without a seed with another sample of the same distribution."""
    EXACT = "exact"
    """Only those that go on exactly as they would have."""
    OFF = "off"
    """None: a lost stream ends with an error event."""


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one replica's engine is run."""

    kind: EngineKind = EngineKind.VLLM
    """`vllm`, `sim` (simulated, no weights) or `external` (servers that run already)."""
    model: str = ""
    """Hub id or path of the weights; a relative path is resolved against the models file."""
    runner: str = "generate"
    """`generate` or `pooling` (embeddings, scores)."""
    max_model_len_tokens: int | None = None
    """Context length: prompt and answer together; none takes the model's own."""
    dtype: str = "auto"
    """Number format of weights and activations, as vLLM names it."""
    quantization: Quantization = Quantization.NONE
    """`none` (what the checkpoint says), `awq`, `gptq`, `compressed-tensors`, `int8`, `fp8` or
    `bitsandbytes`. `int8` and `fp8` quantize while loading: `fp8` needs a GPU, and vLLM 0.32's
    `int8` covers the experts of mixture models only."""
    chat_template: str | None = None
    """Path of a Jinja template for models without one; relative as `model`."""
    max_num_seqs: int | None = None
    """Sequences the engine runs at once."""
    max_queued_requests: int = 512
    """The engine's own backstop: in-flight requests above it are rejected with 503."""
    kv_cache_memory_bytes: int | None = None
    """Memory for the KV cache; none lets the engine take its share (128 MiB on a CPU)."""
    shutdown_timeout_s: int = 30
    """Seconds an engine gets to finish what is in flight after SIGTERM."""
    startup_timeout_s: int = 900
    """Seconds from start to READY before the replica counts as failed."""
    args: tuple[str, ...] = ()
    """Further engine arguments, passed as they are."""
    env: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    """Further environment of the engine. Secrets do not belong here: this is stored in Redis."""
    urls: tuple[str, ...] = ()
    """`external` only: base URLs, one replica each."""
    api_key_env: str | None = None
    """`external` only: name of the environment variable that holds the servers' API key."""


class ResourceSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one replica needs of its host."""

    gpus: int = 0
    """GPUs that a `vllm` replica runs on; 0 runs it on the CPU. Other kinds use none."""
    gpu_memory_bytes: int = 0
    """Reserved on each of its GPUs; replicas that name it may share a GPU. 0 takes GPUs whole.

    The agent turns it into the engine's share: this over the GPU's own memory.
    """
    cpu_fallback: bool = False
    """Run on the CPU of a host without GPUs while the fleet knows no host with such GPUs.

    The decision is the order's: `gpu_indices` names the GPUs; empty means CPU.
    """
    cpus: float = 1.0
    """CPU cores it is expected to use: balances hosts, refuses none."""
    memory_bytes: int = 1 << 30
    """Main memory that a `vllm` replica needs: a host whose memory is spoken for gets no more."""


class ReplicaBounds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many replicas are wanted, and between which bounds `redmesh scale` may move that."""

    count: int = 1
    """Replicas wanted when the model is first declared."""
    min: int = 0
    """Least number that may be asked for."""
    max: int = 1024
    """Largest number that may be asked for."""


class RoutingSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How requests are spread over the replicas."""

    max_requests_per_replica: int = 256
    """A replica with this many reservations is full. Keep it below the engine's own limit."""
    max_requests: int = 100_000
    """Cap on reservations of the whole model."""
    request_timeout_s: float = 600.0
    """Longest wait for the first byte of an answer, all tries together."""
    inter_byte_timeout_s: float = 120.0
    """Longest silence in the middle of an answer; a stream then goes on elsewhere, if it can."""
    stream_failover: StreamFailover = StreamFailover.AUTO
    """Which streams go on from another replica: `valid` (all that can), `exact` (only those that go
    on exactly as they would have), `off`, or `auto`: `valid`, and `off` for `external` servers."""
    prefix_affinity: bool = True
    """Send a prompt where its beginning is probably in the engine's prefix cache, while that is
    sooner than on the idlest replica. Switch it off where engines have no prefix cache."""
    affinity_absolute: int = 0
    """Tokens of work that affinity may put up with beyond that."""
    affinity_relative: float = 1.0
    """The same, as a multiple of the idlest replica's outstanding work; the larger one counts."""


class DeploymentSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model as the operator declares it."""

    name: str
    """What clients call the model, and operators the deployment."""
    aliases: tuple[str, ...] = ()
    """Other names clients may use for the model, such as its hub id."""
    engine: EngineSpec = msgspec.field(default_factory=EngineSpec)
    resources: ResourceSpec = msgspec.field(default_factory=ResourceSpec)
    replicas: ReplicaBounds = msgspec.field(default_factory=ReplicaBounds)
    routing: RoutingSpec = msgspec.field(default_factory=RoutingSpec)

    @property
    def stream_failover(self) -> StreamFailover:
        """Which streams go on, `auto` resolved."""
        declared = self.routing.stream_failover
        if declared is not StreamFailover.AUTO:
            return declared
        external = self.engine.kind is EngineKind.EXTERNAL
        return StreamFailover.OFF if external else StreamFailover.VALID

    def revision(self) -> str:
        """Name the engine that this spec runs: 10 hexadecimal digits of a content hash."""
        content = msgspec.json.encode(
            (self.name, self.aliases, self.engine, self.resources), order="deterministic"
        )
        return hashlib.sha256(content).hexdigest()[:10]


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """A declared deployment as stored: field `<model>` of the fleet's `deployments` hash."""

    spec: DeploymentSpec
    generation: int
    """Grows by one with every change; a write names the generation it saw."""
    replicas: int
    """Replicas wanted now: `spec.replicas.count` until somebody scales."""
    deleted: bool = False
    """Set by `redmesh delete`: the controller drains everything, then forgets the model."""
    updated_ms: int = 0
    updated_by: str = ""


class ModelsFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The document that `redmesh apply -f` reads."""

    models: tuple[DeploymentSpec, ...]
    schema: str = msgspec.field(default="", name="$schema")
