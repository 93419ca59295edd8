"""The engine's metrics under vLLM's names and labels, kept as plain numbers and written by hand.

Counters are added to once per step or request, never through a label lookup per token.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from time import time
from typing import Final

_FIRST_TOKEN_S: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS_S: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS: Final = tuple(
    float(n) for n in (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
)
FINISH_REASONS: Final = ("stop", "length", "abort", "error", "repetition")
REJECTION_REASONS: Final = ("max_num_queued_reqs", "max_num_queued_tokens")


class Histogram:
    """Cumulative buckets with a sum, as Prometheus has them."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str, created_s: float) -> Iterable[str]:
        """Write the series of this histogram."""
        total = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            limit = "+Inf" if bound == float("inf") else repr(bound)
            yield f'{name}_bucket{{{labels},le="{limit}"}} {float(total)}'
        yield f"{name}_count{{{labels}}} {float(total)}"
        yield f"{name}_sum{{{labels}}} {self._sum}"
        yield f"{name}_created{{{labels}}} {created_s}"


class EngineMetrics:
    """What one engine has done. Gauges are published by the step loop, so they freeze with it."""

    def __init__(self, model_name: str, cache: dict[str, str]) -> None:
        self._labels = f'engine="0",model_name="{_escaped(model_name)}"'
        self._model = f'model_name="{_escaped(model_name)}"'
        self._cache = cache
        self._created_s = time()
        self.running = 0
        self.waiting = 0
        self.kv_usage = 0.0
        self.preemptions = 0
        self.prefix_queried_tokens = 0
        self.prefix_hit_tokens = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: dict[str, int] = dict.fromkeys(FINISH_REASONS, 0)
        self.rejected: dict[str, int] = dict.fromkeys(REJECTION_REASONS, 0)
        self.http: dict[tuple[str, str, str], int] = {}
        self.first_token_s = Histogram(_FIRST_TOKEN_S)
        self.between_tokens_s = Histogram(_BETWEEN_TOKENS_S)
        self.per_token_s = Histogram(_BETWEEN_TOKENS_S)
        self.request_s = Histogram(_REQUEST_S)
        self.queue_s = Histogram(_REQUEST_S)
        self.prefill_s = Histogram(_REQUEST_S)
        self.decode_s = Histogram(_REQUEST_S)
        self.inference_s = Histogram(_REQUEST_S)
        self.step_tokens = Histogram(_STEP_TOKENS)

    def count_http(self, handler: str, method: str, status: int) -> None:
        """Count one answer by its route."""
        key = (handler, method, f"{status // 100}xx")
        self.http[key] = self.http.get(key, 0) + 1

    def render(self) -> bytes:
        """Write everything in the Prometheus text format."""
        lines: list[str] = []
        self._gauges(lines)
        self._counters(lines)
        for name, histogram in (
            ("vllm:time_to_first_token_seconds", self.first_token_s),
            ("vllm:inter_token_latency_seconds", self.between_tokens_s),
            ("vllm:request_time_per_output_token_seconds", self.per_token_s),
            ("vllm:e2e_request_latency_seconds", self.request_s),
            ("vllm:request_queue_time_seconds", self.queue_s),
            ("vllm:request_prefill_time_seconds", self.prefill_s),
            ("vllm:request_decode_time_seconds", self.decode_s),
            ("vllm:request_inference_time_seconds", self.inference_s),
            ("vllm:iteration_tokens_total", self.step_tokens),
        ):
            lines.append(f"# TYPE {name} histogram")
            lines += histogram.lines(name, self._labels, self._created_s)
        lines.append("")
        return "\n".join(lines).encode()

    def _gauges(self, lines: list[str]) -> None:
        labels = self._labels
        for name, value in (
            ("vllm:num_requests_running", self.running),
            ("vllm:num_requests_waiting", self.waiting),
            ("vllm:kv_cache_usage_perc", self.kv_usage),
        ):
            lines += [f"# TYPE {name} gauge", f"{name}{{{labels}}} {float(value)}"]
        name = "vllm:num_requests_waiting_by_reason"
        lines += [
            f"# TYPE {name} gauge",
            f'{name}{{{labels},reason="capacity"}} {float(self.waiting)}',
            f'{name}{{{labels},reason="deferred"}} 0.0',
        ]
        cache = ",".join(f'{key}="{value}"' for key, value in self._cache.items())
        name = "vllm:cache_config_info"
        lines += [f"# TYPE {name} gauge", f'{name}{{engine="0",{cache}}} 1.0']

    def _counters(self, lines: list[str]) -> None:
        computed = self.prompt_tokens - self.prefix_hit_tokens
        for name, value in (
            ("vllm:num_preemptions", self.preemptions),
            ("vllm:prefix_cache_queries", self.prefix_queried_tokens),
            ("vllm:prefix_cache_hits", self.prefix_hit_tokens),
            ("vllm:prompt_tokens_cached", self.prefix_hit_tokens),
            ("vllm:prompt_tokens", self.prompt_tokens),
            ("vllm:generation_tokens", self.generation_tokens),
        ):
            lines += self._counter(name, {self._labels: value})
        lines += self._counter(
            "vllm:prompt_tokens_by_source",
            {
                f'{self._labels},source="local_compute"': max(0, computed),
                f'{self._labels},source="local_cache_hit"': self.prefix_hit_tokens,
                f'{self._labels},source="external_kv_transfer"': 0,
            },
        )
        lines += self._counter(
            "vllm:request_success",
            {
                f'{self._labels},finished_reason="{reason}"': count
                for reason, count in self.finished.items()
            },
        )
        lines += self._counter(
            "vllm:admission_rejections",
            {f'{self._model},reason="{reason}"': n for reason, n in self.rejected.items()},
        )
        lines += self._counter(
            "http_requests",
            {
                f'handler="{handler}",method="{method}",status="{status}"': count
                for (handler, method, status), count in self.http.items()
            },
        )

    def _counter(self, name: str, series: dict[str, int]) -> list[str]:
        lines = [f"# TYPE {name}_total counter"]
        lines += [f"{name}_total{{{labels}}} {float(value)}" for labels, value in series.items()]
        lines.append(f"# TYPE {name}_created gauge")
        lines += [f"{name}_created{{{labels}}} {self._created_s}" for labels in series]
        return lines


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
