"""The command line: vLLM's flags as far as the agent passes them, and the simulator's own."""

import argparse
from collections.abc import Mapping

import msgspec

from services.simengine.faults import FaultOrder, parse_fault
from services.simengine.scheduler import Limits, StepCost

KV_BYTES_PER_TOKEN = 16384
"""KV bytes a token is taken to need: what a model of one to two billion parameters needs."""
DEFAULT_KV_TOKENS = 262144
KEEP_ALIVE_S = 5.0
"""How long an idle connection stays open, as in uvicorn, unless the environment says otherwise."""
FAULTS_VARIABLE = "REDMESH_SIM_FAULTS"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a started engine knows about itself."""

    model: str
    names: tuple[str, ...]
    host: str
    port: int
    pooling: bool
    shutdown_timeout_s: float
    keep_alive_s: float
    limits: Limits
    cost: StepCost
    mean_answer_tokens: int
    startup_delay_s: float
    never_ready: bool
    allow_faults: bool
    faults: tuple[FaultOrder, ...]
    api_key: str | None
    seed: int | None


def parse(argv: list[str], environ: Mapping[str, str]) -> Options:
    """Parse and check; a mistake raises SystemExit(2) after one clear message on stderr."""
    parser = _parser()
    given = parser.parse_args(argv)
    if given.speed <= 0:
        parser.error("--speed must be above 0")
    kv_tokens = given.kv_cache_tokens
    if given.kv_cache_memory_bytes is not None:
        kv_tokens = given.kv_cache_memory_bytes // KV_BYTES_PER_TOKEN
    kv_tokens -= kv_tokens % given.block_size
    if kv_tokens < given.max_model_len:
        parser.error(
            f"the KV cache holds {kv_tokens} tokens, fewer than --max-model-len "
            f"{given.max_model_len}: raise --kv-cache-memory-bytes (at "
            f"{KV_BYTES_PER_TOKEN} bytes a token) or lower --max-model-len"
        )
    texts = [*environ.get(FAULTS_VARIABLE, "").split(), *given.fault]
    try:
        faults = tuple(parse_fault(text) for text in texts)
    except ValueError as error:
        parser.error(str(error))
    return Options(
        model=given.model,
        names=tuple(given.served_model_name or [given.model]),
        host=given.host,
        port=given.port,
        pooling=given.runner == "pooling",
        shutdown_timeout_s=given.shutdown_timeout,
        keep_alive_s=float(environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE") or KEEP_ALIVE_S),
        limits=Limits(
            max_model_len=given.max_model_len,
            max_num_seqs=given.max_num_seqs,
            max_num_batched_tokens=given.max_num_batched_tokens,
            kv_tokens=kv_tokens,
            block_tokens=given.block_size,
            prefix_caching=given.enable_prefix_caching,
            max_queued_requests=given.max_num_queued_reqs,
            max_queued_tokens=given.max_num_queued_tokens,
        ),
        cost=StepCost(
            step_ms=given.step_ms / given.speed,
            prefill_us_per_token=given.prefill_us_per_token / given.speed,
            decode_us_per_seq=given.decode_us_per_seq / given.speed,
        ),
        mean_answer_tokens=given.mean_answer_tokens,
        startup_delay_s=given.startup_delay_s,
        never_ready=given.never_ready,
        allow_faults=given.allow_faults,
        faults=faults,
        # From the environment alone: others can read argv.
        api_key=environ.get("VLLM_API_KEY") or None,
        seed=given.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="redmesh simengine",
        description="A believable vLLM without weights, for tests, drills and load work.",
        allow_abbrev=False,
    )
    vllm = parser.add_argument_group("vLLM's flags")
    vllm.add_argument("--model", required=True, help="recorded as the model's root; not read")
    vllm.add_argument("--served-model-name", nargs="+", metavar="NAME")
    vllm.add_argument("--host", default="127.0.0.1")
    vllm.add_argument("--port", type=_port, default=8000, help="0 takes any free port")
    vllm.add_argument("--max-model-len", type=_positive, default=4096, metavar="TOKENS")
    vllm.add_argument("--max-num-seqs", type=_positive, default=256)
    vllm.add_argument("--max-num-batched-tokens", type=_positive, default=8192, metavar="TOKENS")
    vllm.add_argument("--max-num-queued-reqs", type=_positive)
    vllm.add_argument("--max-num-queued-tokens", type=_positive)
    vllm.add_argument("--block-size", type=_positive, default=16, metavar="TOKENS")
    vllm.add_argument("--kv-cache-memory-bytes", type=_positive, metavar="BYTES")
    vllm.add_argument("--runner", choices=["auto", "generate", "pooling"], default="auto")
    vllm.add_argument("--shutdown-timeout", type=_not_negative, default=0.0, metavar="SECONDS")
    vllm.add_argument("--seed", type=int, help="seeds requests that bring a temperature alone")
    vllm.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True
    )
    ignored = parser.add_argument_group("vLLM's flags that change nothing here")
    ignored.add_argument("--dtype")
    ignored.add_argument("--quantization")
    ignored.add_argument("--chat-template", metavar="PATH")
    ignored.add_argument("--tensor-parallel-size", type=_positive)
    ignored.add_argument("--gpu-memory-utilization", type=float)
    ignored.add_argument("--enforce-eager", action="store_true")
    ignored.add_argument("--trust-remote-code", action="store_true")
    own = parser.add_argument_group("the simulator's own flags")
    own.add_argument("--step-ms", type=_not_negative, default=8.0, help="time of an empty step")
    own.add_argument("--prefill-us-per-token", type=_not_negative, default=30.0)
    own.add_argument("--decode-us-per-seq", type=_not_negative, default=40.0)
    own.add_argument("--speed", type=float, default=1.0, help="divides all times")
    own.add_argument("--kv-cache-tokens", type=_positive, default=DEFAULT_KV_TOKENS)
    own.add_argument(
        "--mean-answer-tokens",
        type=_not_negative_int,
        default=160,
        help="how long answers are that end by themselves; 0: none does. "
        "The same on all replicas of a model, or their answers differ",
    )
    own.add_argument("--startup-delay-s", type=_not_negative, default=0.0)
    own.add_argument("--never-ready", action="store_true", help="never begin to listen")
    own.add_argument("--allow-faults", action="store_true", help="serve POST /sim/faults")
    own.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND[:KEY=N,...]",
        help=f"a fault in force from the start; also read from {FAULTS_VARIABLE}",
    )
    return parser


def _port(value: str) -> int:
    number = int(value)
    if not 0 <= number <= 65535:
        message = f"{value} is not a port (0 to 65535)"
        raise argparse.ArgumentTypeError(message)
    return number


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        message = f"{value} is not at least 1"
        raise argparse.ArgumentTypeError(message)
    return number


def _not_negative_int(value: str) -> int:
    number = int(value)
    if number < 0:
        message = f"{value} is below 0"
        raise argparse.ArgumentTypeError(message)
    return number


def _not_negative(value: str) -> float:
    number = float(value)
    if not number >= 0:
        message = f"{value} is below 0"
        raise argparse.ArgumentTypeError(message)
    return number
