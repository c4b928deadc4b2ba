"""What is counted, under which names, with bounded labels, and over HTTP."""

from __future__ import annotations

import threading
import urllib.request
from dataclasses import replace

from polyhead_server.metrics import BACKBONE, OTHER_ADAPTERS, Metrics, StepFigures

STEP = StepFigures(
    rows=4, distinct_adapters=3, prefill_tokens=10, decode_tokens=2, phase_seconds={"forward": 0.5, "sample": 0.25}
)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_requests_are_counted_by_outcome_and_adapter() -> None:
    metrics = Metrics()
    metrics.request_ended("finished", "french", 10, 5)
    metrics.request_ended("finished", "", 1, 2)
    metrics.request_ended("cancelled", "french", 3, 0)
    assert value(metrics, "polyhead_requests_total", outcome="finished") == 2
    assert value(metrics, "polyhead_requests_total", outcome="cancelled") == 1
    assert value(metrics, "polyhead_prompt_tokens_total") == 14
    assert value(metrics, "polyhead_completion_tokens_total") == 7
    assert value(metrics, "polyhead_adapter_requests_total", adapter="french") == 2
    assert value(metrics, "polyhead_adapter_completion_tokens_total", adapter=BACKBONE) == 2


def test_adapter_labels_are_bounded_whatever_the_threads_do() -> None:
    metrics = Metrics(max_adapter_labels=5)

    def count(first: int) -> None:
        for number in range(200):
            metrics.request_ended("finished", f"adapter{(first + number) % 50}", 1, 1)

    threads = [threading.Thread(target=count, args=(first,)) for first in range(0, 40, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (family,) = [f for f in metrics.registry.collect() if f.name == "polyhead_adapter_requests"]
    counts = {s.labels["adapter"]: s.value for s in family.samples if s.name.endswith("_total")}
    assert len(counts) == 6
    assert OTHER_ADAPTERS in counts
    assert sum(counts.values()) == 800


def test_no_adapter_labels_at_all_is_possible() -> None:
    metrics = Metrics(max_adapter_labels=0)
    metrics.request_ended("finished", "french", 1, 1)
    assert value(metrics, "polyhead_adapter_requests_total", adapter=OTHER_ADAPTERS) == 1


def test_a_step_counts_rows_tokens_phases_and_shared_batches() -> None:
    metrics = Metrics()
    metrics.step(STEP)
    metrics.step(replace(STEP, rows=1, distinct_adapters=1, prefill_tokens=0, decode_tokens=1))
    assert value(metrics, "polyhead_steps_total") == 2
    assert value(metrics, "polyhead_mixed_adapter_steps_total") == 1
    assert value(metrics, "polyhead_batch_rows_sum") == 5
    assert value(metrics, "polyhead_batch_distinct_adapters_bucket", le="1.0") == 1
    assert value(metrics, "polyhead_prefill_tokens_total") == 10
    assert value(metrics, "polyhead_decode_tokens_total") == 3
    assert value(metrics, "polyhead_step_phase_seconds_total", phase="forward") == 1.0
    assert value(metrics, "polyhead_step_seconds_sum") == 1.5


def test_latencies_memory_and_adapters() -> None:
    metrics = Metrics()
    metrics.queue_time(0.1)
    metrics.first_token(0.2)
    metrics.inter_token(0.01)
    metrics.queue(7, 3)
    metrics.kv_blocks(5, 100)
    metrics.adapter_pool(6, 64)
    metrics.adapter_loaded(1.5)
    metrics.adapter_load_failed()
    metrics.adapter_evicted()
    expected = {
        "polyhead_queue_time_seconds_sum": 0.1,
        "polyhead_time_to_first_token_seconds_sum": 0.2,
        "polyhead_inter_token_latency_seconds_sum": 0.01,
        "polyhead_requests_waiting": 7,
        "polyhead_requests_running": 3,
        "polyhead_kv_blocks_used": 5,
        "polyhead_kv_blocks": 100,
        "polyhead_adapter_pool_pages_used": 6,
        "polyhead_adapter_pool_pages": 64,
        "polyhead_adapter_loads_total": 1,
        "polyhead_adapter_load_seconds_sum": 1.5,
        "polyhead_adapter_load_failures_total": 1,
        "polyhead_adapter_evictions_total": 1,
    }
    assert {name: value(metrics, name) for name in expected} == expected


def test_every_name_has_the_prefix_and_two_objects_share_nothing() -> None:
    metrics, other = Metrics(), Metrics()
    metrics.adapter_evicted()
    assert value(other, "polyhead_adapter_evictions_total") == 0
    assert all(family.name.startswith("polyhead_") for family in metrics.registry.collect())


def test_scrapes_are_answered() -> None:
    metrics = Metrics()
    port = metrics.serve("127.0.0.1", 0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        assert b"polyhead_steps_total 0.0" in response.read()


def test_a_scrape_of_some_names_finds_those_of_steps() -> None:
    metrics = Metrics()
    metrics.step(STEP)
    names = ["polyhead_steps_total", "polyhead_step_seconds_count"]
    found = {s.name: s.value for f in metrics.registry.restricted_registry(names).collect() for s in f.samples}
    assert found == {"polyhead_steps_total": 1, "polyhead_step_seconds_count": 1}
