"""peft + transformers in the project's own environment: one batch whose rows name their adapters, greedy."""

from __future__ import annotations

import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from protocol import Reply, RowTimes, serve
from transformers import StoppingCriteria

sys.path.insert(0, str(Path(__file__).parents[1]))  # this is a script: its own folder is the one on the path

from serving_peer import PeftPeer
from serving_workload import Ask


class _Clock(StoppingCriteria):
    """Stops nothing: generate() asks it after every token."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Peft:
    def load(self, backbone: str, folder: str, adapters: list[str], dtype: str, tuning_prompt: list[int]) -> Reply:
        self._peer = PeftPeer(Path(backbone), Path(folder), adapters, getattr(torch, dtype))
        asks = [Ask(prompt=tuple(tuning_prompt), output_tokens=1, adapter=name) for name in adapters[:8]]
        num_threads = self._peer.tune(asks)
        settings = {"dtype": dtype, "threads": num_threads, "cores": len(os.sched_getaffinity(0))}
        return {"versions": {name: metadata.version(name) for name in ("peft", "transformers", "torch")},
                "settings": settings}  # fmt: skip

    def decode(self, prompts: list[list[int]], adapters: list[str | None], steps: int) -> Reply:
        clock = _Clock()
        self._generate(prompts, adapters, steps + 1, clock)
        return RowTimes([clock.times_s] * len(prompts)).steady(steps)

    def say(self, prompt: list[int], tokens: int, adapter: str | None) -> Reply:
        return {"token_ids": self._generate([prompt], [adapter], tokens, _Clock())[0]}

    def _generate(
        self, prompts: list[list[int]], adapters: list[str | None], tokens: int, clock: _Clock
    ) -> list[list[int]]:
        asks = [
            Ask(prompt=tuple(prompt), output_tokens=tokens, adapter=adapter)
            for prompt, adapter in zip(prompts, adapters, strict=True)
        ]
        _, answers = self._peer.generate(asks, clock)
        return [list(answer) for answer in answers]


if __name__ == "__main__":
    peer = Peft()
    serve({"load": peer.load, "decode": peer.decode, "say": peer.say})
