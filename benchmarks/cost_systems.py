"""Runs the three systems of the cost benchmark over the same asks, for one number of fine-tunes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cost_adapters import adapter_name, file_bytes
from cost_load import EngineOf, Outcome, in_turns, mixed
from cost_merge import Merger
from in_process import InProcessEngine, engine_with, load_adapter
from serving_workload import OUTPUT_TOKENS, PROMPT_TOKENS, Ask, draw_asks

from polyhead_core.backbone import Backbone
from polyhead_server.store.residency import Residency

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Swap:
    """What it takes to make another fine-tune the running one, and what must be kept for it."""

    method: str
    seconds: float
    extra_memory_bytes: int
    disk_bytes_per_fine_tune: int


@dataclass(kw_only=True)
class Systems:
    merger: Merger
    adapters: Path
    """Folder of the fine-tunes as adapters; grows with their number."""
    settings: dict[str, Any]
    """Of every engine: ServerConfig's."""
    requests: int
    concurrency: int
    repeats: int
    seed: int
    memory_limit_bytes: int
    """What dedicated models may take together."""
    max_dedicated: int
    dedicated: list[Backbone] = field(default_factory=list)
    """Merged models of the first fine-tunes, kept from one number of fine-tunes to the next."""

    def asks(self, fine_tunes: int, repeat: int) -> list[Ask]:
        rng = random.Random(f"{self.seed}/{fine_tunes}/{repeat}")
        names = [adapter_name(number) for number in range(fine_tunes)]
        return draw_asks(rng, self.requests, names, self.merger.int8.vocab_size)

    # --- Polyhead ---

    def polyhead(self, fine_tunes: int) -> tuple[Row, list[Outcome]]:
        """Measured, whatever N is: adapters that do not fit the pool come from the host cache or the disk."""
        with engine_with(self.adapters, loaded=_copy_of(self.merger.int8), **self.settings) as engine:
            resident = _load_most_popular(engine, fine_tunes)
            _warm_up(engine, adapter_name(0))
            outcomes = [mixed(engine, self.asks(fine_tunes, r), self.concurrency) for r in range(self.repeats)]
            infos = engine.store.list()
            held = {state.name: sum(info.residency is state for info in infos) for state in Residency}
            sizes = [info.device_bytes for info in infos if info.device_bytes]
            per_adapter = statistics.mean(sizes)
            # A host copy stays behind the device pool's; what the host cache has no room for is on the disk alone.
            host_bytes = min(per_adapter * fine_tunes, engine.config.host_cache_bytes)
            tables = engine.store.tables
            table_bytes = sum(table.nbytes for table in (tables.num_pages, tables.pages, tables.bias))
            row = {
                "memory_bytes": engine.backbone.num_bytes + engine.store.pool_used_bytes + host_bytes + table_bytes,
                "memory_parts": {
                    "backbone": engine.backbone.num_bytes,
                    "adapter_pool_used": engine.store.pool_used_bytes,
                    "host_cache": host_bytes,
                    "page_tables": table_bytes,
                },
                "adapter_pool_allocated": engine.store.pool_bytes,
                "adapters_loaded_before": resident,
                "adapters_held": held,
                "device_bytes_per_adapter": per_adapter,
                "file_bytes_per_adapter": statistics.mean(file_bytes(self.adapters / i.name) for i in infos),
                "basis": "measured",
            }
        return row | _throughput(outcomes), outcomes

    # --- dedicated merged models ---

    def dedicated_models(self, fine_tunes: int) -> tuple[Row, list[Outcome]]:
        """Measured with N models where they fit; else the same turns on one merged model that stands for all."""
        model_bytes = self.merger.int8.num_bytes
        fits = fine_tunes <= self.max_dedicated and fine_tunes * model_bytes <= self.memory_limit_bytes
        count = fine_tunes if fits else 1
        while len(self.dedicated) < count:
            self.dedicated.append(self.merger.dedicated(self.adapters / adapter_name(len(self.dedicated))))
        with contextlib.ExitStack() as stack:
            engines = [self._merged_engine(stack, number) for number in range(count)]
            engine_of = _named(engines) if fits else _stand_in(engines[0])
            outcomes = [
                in_turns(engine_of, engines, self.asks(fine_tunes, r), self.concurrency) for r in range(self.repeats)
            ]
        basis = (
            f"measured with {count} models in memory"
            if fits
            else f"computed from 1 merged model's bytes x {fine_tunes}, and the time of the same batches measured on it"
        )
        row = {"memory_bytes": fine_tunes * model_bytes, "basis": basis}
        return row | _throughput(outcomes), outcomes

    def _merged_engine(self, stack: contextlib.ExitStack, number: int) -> InProcessEngine:
        settings = self.settings | {
            "kv_cache_bytes": self._kv_bytes(),
            "adapter_pool_bytes": 1 << 20,
            "max_resident_adapters": 1,
        }
        backbone = _copy_of(self.dedicated[number])
        engine = stack.enter_context(engine_with(None, loaded=backbone, **settings))
        _warm_up(engine, None)
        return engine

    def _kv_bytes(self) -> int:
        """Room for all callers at their longest: a model of its own has to be ready for them all."""
        text = self.merger.int8.model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        per_token = 2 * text.num_hidden_layers * heads * width * 4
        tokens = PROMPT_TOKENS.high + OUTPUT_TOKENS.high + 16
        return int(per_token * tokens * self.concurrency)

    # --- one model, swapped ---

    def swapped(self, fine_tunes: int, turns: Sequence[Outcome], swap: Swap) -> Row:
        """Always computed: the turns of dedicated models, and a swap at the start of each but the first."""
        seconds = [one.wall_s + (one.num_turns - 1) * swap.seconds for one in turns]
        rates = [one.output_tokens / wall_s for one, wall_s in zip(turns, seconds, strict=True)]
        return {
            "memory_bytes": self.merger.int8.num_bytes + swap.extra_memory_bytes,
            "disk_bytes": fine_tunes * swap.disk_bytes_per_fine_tune,
            "output_tokens_per_s": statistics.median(rates),
            "output_tokens_per_s_min": min(rates),
            "output_tokens_per_s_max": max(rates),
            "mean_rows": statistics.median(one.mean_rows for one in turns),
            "swaps": statistics.median(one.num_turns - 1 for one in turns),
            "basis": f"computed from the dedicated models' batches and a measured swap of {swap.seconds:.3f} s "
            f"({swap.method})",
        }


def same_first_tokens(outcomes: Sequence[Outcome], others: Sequence[Outcome]) -> float:
    """Share of the requests that two systems began alike."""
    pairs = [
        pair
        for one, other in zip(outcomes, others, strict=True)
        for pair in zip(one.first_tokens, other.first_tokens, strict=True)
    ]
    return statistics.mean(float(a == b) for a, b in pairs)


def _throughput(outcomes: Sequence[Outcome]) -> Row:
    rates = [one.tokens_per_s for one in outcomes]
    return {
        "output_tokens_per_s": statistics.median(rates),
        "output_tokens_per_s_min": min(rates),
        "output_tokens_per_s_max": max(rates),
        "mean_rows": statistics.median(one.mean_rows for one in outcomes),
        "turns": statistics.median(one.num_turns for one in outcomes),
    }


def _load_most_popular(engine: InProcessEngine, fine_tunes: int) -> int:
    """Brings in the most popular adapters as far as they fit, as a long run under the same load would have."""
    loaded = 0
    for number in range(min(fine_tunes, engine.config.max_resident_adapters)):
        info = load_adapter(engine.store, adapter_name(number))
        loaded += 1
        if engine.store.pool_used_bytes + 2 * info.device_bytes > engine.store.pool_bytes:
            break
    return loaded


def _warm_up(engine: InProcessEngine, adapter: str | None) -> None:
    answers = [engine.submit([256 + i] * 8, adapter=adapter, max_tokens=4, ignore_eos=True) for i in range(4)]
    for answer in answers:
        answer.result()


def _copy_of(backbone: Backbone) -> Backbone:
    """A tree of its own over the same weights: an engine changes the modules' forwards for good."""
    memo = {id(tensor): tensor for tensor in (*backbone.model.parameters(), *backbone.model.buffers())}
    return dataclasses.replace(backbone, model=copy.deepcopy(backbone.model, memo))


def _named(engines: Sequence[InProcessEngine]) -> EngineOf:
    by_name = {adapter_name(number): engine for number, engine in enumerate(engines)}
    return lambda name: by_name[name]


def _stand_in(engine: InProcessEngine) -> EngineOf:
    return lambda _: engine
