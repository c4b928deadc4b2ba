"""llama.cpp through llama-cpp-python's low-level batch API: the backbone in Q8_0, one sequence a row, greedy.

Runs under the peer's own Python. For each shape of work it tries thread counts, flash attention and the layout of the
KV cache, and keeps what was fastest: that is the peer's best configuration.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
from protocol import Reply, RowTimes, serve

BATCH_TOKENS = 512
CONTEXT_TOKENS_PER_ROW = 512
"""Of a decoding row; a context for prefill has BATCH_TOKENS more."""
TUNING_STEPS = 6

_cores = len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class Configuration:
    num_threads: int
    flash_attention: bool
    unified_kv: bool
    """One KV buffer for all sequences, or one for each."""


CANDIDATES = [
    Configuration(num_threads=num_threads, flash_attention=flash, unified_kv=unified)
    for num_threads in sorted({_cores, max(1, _cores // 2)}, reverse=True)
    for flash in (True, False)
    for unified in (False, True)
]


class Item(NamedTuple):
    row: int
    token_id: int
    position: int
    wants_logits: bool


class Context:
    """One llama_context and the batch that feeds it."""

    def __init__(self, model: Any, num_rows: int, configuration: Configuration) -> None:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = num_rows * CONTEXT_TOKENS_PER_ROW + (BATCH_TOKENS if num_rows == 1 else 0)
        settings.n_batch = settings.n_ubatch = BATCH_TOKENS
        settings.n_seq_max = num_rows
        settings.n_threads = settings.n_threads_batch = configuration.num_threads
        settings.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if configuration.flash_attention
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        settings.kv_unified = configuration.unified_kv
        settings.no_perf = True
        self._context = llama_cpp.llama_init_from_model(model, settings)
        if not self._context:
            raise RuntimeError(f"llama_init_from_model refused {configuration} for {num_rows} rows")
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def run(self, items: Sequence[Item]) -> dict[int, int]:
        """Computes at most BATCH_TOKENS tokens; the likeliest next token of every row that wants logits."""
        batch = self._batch
        batch.n_tokens = len(items)
        for place, item in enumerate(items):
            batch.token[place], batch.pos[place] = item.token_id, item.position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, item.row
            batch.logits[place] = item.wants_logits
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code} for {len(items)} tokens")
        return {item.row: self._argmax(place) for place, item in enumerate(items) if item.wants_logits}

    def _argmax(self, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, place)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self._vocab_size)).contents
        return int(np.frombuffer(address, dtype=np.float32).argmax())


class LlamaCpp:
    def __init__(self) -> None:
        self._contexts: dict[tuple[str, int], tuple[Configuration, Context]] = {}

    def load(self, gguf: str, quantised: str) -> Reply:
        llama_cpp.llama_backend_init()
        if not Path(quantised).exists():
            _quantise(gguf, quantised)
        self._model = llama_cpp.llama_model_load_from_file(quantised.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama_model_load_from_file refused {quantised}")
        system = llama_cpp.llama_print_system_info().decode().strip()
        return {
            "versions": {"llama_cpp_python": llama_cpp.__version__},
            "settings": {"weights": "Q8_0 (llama_model_quantize)", "kv": "f16", "system_info": system},
        }

    def decode(self, prompts: list[list[int]], adapters: list[str | None], steps: int) -> Reply:
        if any(adapters):
            raise ValueError("llama.cpp does not run different adapters in one batch")
        configuration, context = self._tuned("decode", len(prompts), lambda c: _decode(c, prompts, TUNING_STEPS))
        return {**_decode(context, prompts, steps), "configuration": asdict(configuration)}

    def prefill(self, prompts: list[list[int]]) -> Reply:
        configuration, context = self._tuned("prefill", 1, lambda c: _prefill(c, prompts[:1]))
        return {**_prefill(context, prompts), "configuration": asdict(configuration)}

    def say(self, prompt: list[int], tokens: int, adapter: str | None) -> Reply:
        _, context = self._tuned("decode", 1, lambda c: _decode(c, [prompt], TUNING_STEPS))
        context.clear()
        token_id = _prompt(context, [prompt])[0]
        answer = [token_id]
        while len(answer) < tokens:
            token_id = context.run([Item(0, token_id, len(prompt) + len(answer) - 1, True)])[0]
            answer.append(token_id)
        return {"token_ids": answer}

    def _tuned(self, work: str, num_rows: int, trial: Any) -> tuple[Configuration, Context]:
        """The fastest configuration for this work, found at its first call."""
        if (work, num_rows) not in self._contexts:
            seconds = {}
            for configuration in CANDIDATES:
                if num_rows == 1 and configuration.unified_kv:
                    continue  # the same thing for a single sequence
                context = Context(self._model, num_rows, configuration)
                trial(context)
                seconds[configuration] = min(trial(context)["seconds"] for _ in range(2))
                context.close()
            best = min(seconds, key=lambda configuration: seconds[configuration])
            self._contexts[work, num_rows] = best, Context(self._model, num_rows, best)
        return self._contexts[work, num_rows]


def _decode(context: Context, prompts: Sequence[Sequence[int]], steps: int) -> Reply:
    context.clear()
    tokens = _prompt(context, prompts)
    began_s = time.perf_counter()
    times_s: list[list[float]] = [[began_s] for _ in prompts]
    for step in range(steps):
        tokens = context.run([Item(row, token, len(prompts[row]) + step, True) for row, token in tokens.items()])
        now_s = time.perf_counter()
        for row in tokens:
            times_s[row].append(now_s)
    return RowTimes(times_s).steady(steps)


def _prefill(context: Context, prompts: Sequence[Sequence[int]]) -> Reply:
    seconds = 0.0
    for prompt in prompts:
        context.clear()
        began_s = time.perf_counter()
        _prompt(context, [prompt])
        seconds += time.perf_counter() - began_s
    return {"tokens": sum(map(len, prompts)), "seconds": seconds}


def _prompt(context: Context, prompts: Sequence[Sequence[int]]) -> dict[int, int]:
    """The first token of each row."""
    first: dict[int, int] = {}
    for items in _chunks(
        Item(row, token, position, position == len(prompt) - 1)
        for row, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ):
        first.update(context.run(items))
    return first


def _chunks(items: Iterable[Item]) -> Iterable[list[Item]]:
    chunk: list[Item] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == BATCH_TOKENS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _quantise(gguf: str, quantised: str) -> None:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    # The file at hand is Q4_1: the weights are exactly the ones that Polyhead's int8 is made of.
    settings.allow_requantize = True
    partial = f"{quantised}.partial"
    code = llama_cpp.llama_model_quantize(gguf.encode(), partial.encode(), ctypes.byref(settings))
    if code != 0:
        raise RuntimeError(f"llama_model_quantize returned {code} for {gguf}")
    os.replace(partial, quantised)


if __name__ == "__main__":
    peer = LlamaCpp()
    serve({"load": peer.load, "decode": peer.decode, "prefill": peer.prefill, "say": peer.say})
