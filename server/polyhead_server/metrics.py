"""Everything the server counts, for Prometheus. Owns its registry; knows neither engine nor service, which call it."""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

OTHER_ADAPTERS = "other"
BACKBONE = "(backbone)"

_LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
_ROW_BUCKETS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """One forward pass."""

    rows: int
    distinct_adapters: int
    """The backbone alone counts as one of them."""
    prefill_tokens: int
    decode_tokens: int
    phase_seconds: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.phase_seconds.values())


class _Distribution:
    """The numbers of a histogram."""

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, text: str) -> Metric:
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(f"polyhead_{name}", text, buckets=buckets, sum_value=self._sum)


class _StepMetrics(Collector):
    """What is counted at each step and token: in plain numbers, as the engine's thread waits for it.

    prometheus_client's own objects take a tenth of a millisecond a step, their code out of the caches by then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps = self._mixed_steps = self._prefill_tokens = self._decode_tokens = 0
        self._rows, self._distinct_adapters = _Distribution(_ROW_BUCKETS), _Distribution(_ROW_BUCKETS)
        self._seconds, self._inter_token = _Distribution(_LATENCY_BUCKETS_S), _Distribution(_LATENCY_BUCKETS_S)
        self._phase_seconds: dict[str, float] = {}

    def step(self, step: StepFigures) -> None:
        with self._lock:
            self._steps += 1
            self._mixed_steps += step.distinct_adapters >= 2
            self._rows.add(step.rows)
            self._distinct_adapters.add(step.distinct_adapters)
            self._prefill_tokens += step.prefill_tokens
            self._decode_tokens += step.decode_tokens
            self._seconds.add(step.seconds)
            for phase, seconds in step.phase_seconds.items():
                self._phase_seconds[phase] = self._phase_seconds.get(phase, 0.0) + seconds

    def inter_token(self, seconds: float) -> None:
        with self._lock:
            self._inter_token.add(seconds)

    def collect(self) -> list[Metric]:
        with self._lock:
            return self._families()

    def describe(self) -> list[Metric]:
        """From which the registry knows the names, for scrapes of some of them."""
        return self._families()

    def _families(self) -> list[Metric]:
        def counter(name: str, text: str, value: float) -> Metric:
            return CounterMetricFamily(f"polyhead_{name}", text, value=value)

        phases = CounterMetricFamily(
            "polyhead_step_phase_seconds", "Time spent in steps, by phase.", labels=("phase",)
        )  # fmt: skip
        for phase, seconds in self._phase_seconds.items():
            phases.add_metric((phase,), seconds)
        mixed = "Forward passes with rows of at least 2 adapters; the backbone alone counts as one."
        distinct = "Adapters in one forward pass; the backbone alone counts as one."
        return [
            counter("steps", "Forward passes.", self._steps),
            counter("mixed_adapter_steps", mixed, self._mixed_steps),
            counter("prefill_tokens", "Prompt tokens computed.", self._prefill_tokens),
            counter("decode_tokens", "Tokens computed one at a time, after the prompt.", self._decode_tokens),
            self._rows.family("batch_rows", "Sequences in one forward pass."),
            self._distinct_adapters.family("batch_distinct_adapters", distinct),
            self._seconds.family("step_seconds", "One step, all phases."),
            self._inter_token.family("inter_token_latency_seconds", "Between two tokens of one continuation."),
            phases,
        ]


class Metrics:
    """All methods are thread-safe and quick. Without a `registry` of yours, each object has its own."""

    def __init__(self, registry: CollectorRegistry | None = None, max_adapter_labels: int = 100) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        self._max_adapter_labels = max_adapter_labels
        self._adapter_labels: set[str] = set()
        self._label_lock = threading.Lock()
        ProcessCollector(namespace="polyhead", registry=self.registry)
        self._make_request_metrics()
        self._steps = _StepMetrics()
        self.registry.register(self._steps)
        self._make_memory_metrics()

    def _make_request_metrics(self) -> None:
        self._requests = self._counter("requests", "Calls ended, by outcome.", "outcome")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended calls.")
        self._completion_tokens = self._counter("completion_tokens", "Tokens sent by ended calls.")
        self._adapter_requests = self._counter("adapter_requests", "Calls ended, by adapter.", "adapter")
        self._adapter_prompt_tokens = self._counter(
            "adapter_prompt_tokens", "Prompt tokens of ended calls, by adapter.", "adapter"
        )
        self._adapter_completion_tokens = self._counter(
            "adapter_completion_tokens", "Tokens sent by ended calls, by adapter.", "adapter"
        )
        self._queue_seconds = self._latency("queue_time_seconds", "From admission to a request's first step.")
        self._first_token_seconds = self._latency("time_to_first_token_seconds", "From admission to the first token.")
        self._waiting = self._gauge("requests_waiting", "Requests that wait for their first step.")
        self._running = self._gauge("requests_running", "Requests that take part in steps.")

    def _make_memory_metrics(self) -> None:
        self._kv_used = self._gauge("kv_blocks_used", "KV blocks held by sequences.")
        self._kv_blocks = self._gauge("kv_blocks", "KV blocks there are.")
        self._preemptions = self._counter(
            "preemptions", "Times that a sequence gave up its KV blocks, to be computed again."
        )
        self._pool_used = self._gauge("adapter_pool_pages_used", "Pages of the adapter pool in use.")
        self._pool_pages = self._gauge("adapter_pool_pages", "Pages of the adapter pool.")
        self._loads = self._counter("adapter_loads", "Adapters brought into the device pool.")
        self._load_failures = self._counter("adapter_load_failures", "Adapters that could not be loaded.")
        self._evictions = self._counter("adapter_evictions", "Adapters taken out of the device pool.")
        self._load_seconds = self._latency("adapter_load_seconds", "Bringing one adapter into the device pool.")

    def request_ended(self, outcome: str, adapter: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Called once a call: by the engine for what it admitted, by the service for what never came so far.

        `adapter` must be one that exists, or "" for the backbone alone.
        """
        label = self._adapter_label(adapter)
        self._requests.labels(outcome).inc()
        self._prompt_tokens.inc(prompt_tokens)
        self._completion_tokens.inc(completion_tokens)
        self._adapter_requests.labels(label).inc()
        self._adapter_prompt_tokens.labels(label).inc(prompt_tokens)
        self._adapter_completion_tokens.labels(label).inc(completion_tokens)

    def queue_time(self, seconds: float) -> None:
        self._queue_seconds.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first_token_seconds.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        self._steps.inter_token(seconds)

    def queue(self, waiting: int, running: int) -> None:
        self._waiting.set(waiting)
        self._running.set(running)

    def step(self, step: StepFigures) -> None:
        self._steps.step(step)

    def kv_blocks(self, used: int, total: int) -> None:
        self._kv_used.set(used)
        self._kv_blocks.set(total)

    def preempted(self, times: int) -> None:
        self._preemptions.inc(times)

    def adapter_pool(self, used_pages: int, total_pages: int) -> None:
        self._pool_used.set(used_pages)
        self._pool_pages.set(total_pages)

    def adapter_loaded(self, seconds: float) -> None:
        self._loads.inc()
        self._load_seconds.observe(seconds)

    def adapter_load_failed(self) -> None:
        self._load_failures.inc()

    def adapter_evicted(self) -> None:
        self._evictions.inc()

    def serve(self, host: str, port: int) -> int:
        """Answers scrapes in a thread of its own; port 0 takes a free one. Returns the port. Raises OSError."""
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        return server.server_port

    def _adapter_label(self, adapter: str) -> str:
        if not adapter:
            return BACKBONE
        with self._label_lock:
            if adapter not in self._adapter_labels:
                if len(self._adapter_labels) >= self._max_adapter_labels:
                    return OTHER_ADAPTERS
                self._adapter_labels.add(adapter)
        return adapter

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"polyhead_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"polyhead_{name}", text, registry=self.registry)

    def _latency(self, name: str, text: str) -> Histogram:
        return Histogram(f"polyhead_{name}", text, buckets=_LATENCY_BUCKETS_S, registry=self.registry)
