"""The peer: peft + transformers generating one left-padded batch whose rows name their adapters (`adapter_names`)."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from serving_workload import Ask
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class PeftPeer:
    def __init__(self, backbone_directory: Path, adapters: Path, names: Sequence[str], dtype: torch.dtype) -> None:
        model = AutoModelForCausalLM.from_pretrained(backbone_directory, dtype=dtype)
        self._model = PeftModel.from_pretrained(
            model, adapters / names[0], adapter_name=names[0], low_cpu_mem_usage=True
        )
        for name in names[1:]:
            self._model.load_adapter(adapters / name, adapter_name=name, low_cpu_mem_usage=True)
        # peft keeps adapters in float32 unless told otherwise; the comparison is at one precision throughout.
        self._model.to(dtype)
        self._model.eval()
        self._num_threads = torch.get_num_threads()

    def tune(self, asks: Sequence[Ask]) -> int:
        """Settles on the number of threads that is fastest for a short batch, and returns it.

        peft multiplies thousands of small matrices a step, for which one thread can beat two.
        """
        short = [dataclasses.replace(ask, output_tokens=2) for ask in asks]
        seconds = {}
        for num_threads in {1, len(os.sched_getaffinity(0))}:
            self._num_threads = num_threads
            self.generate(short)
            seconds[num_threads], _ = self.generate(short)
        self._num_threads = min(seconds, key=lambda num_threads: seconds[num_threads])
        return self._num_threads

    @torch.inference_mode()
    def generate(
        self, asks: Sequence[Ask], each_token: StoppingCriteria | None = None
    ) -> tuple[float, list[tuple[int, ...]]]:
        """Seconds for the whole batch, greedy, and the answers. All asks must want the same number of tokens.

        `each_token` is called after each of them, for who wants their times.
        """
        (output_tokens,) = {ask.output_tokens for ask in asks}
        longest = max(len(ask.prompt) for ask in asks)
        ids_BT = torch.zeros(len(asks), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, ask in enumerate(asks):
            ids_BT[row, longest - len(ask.prompt) :] = torch.tensor(ask.prompt)
            mask_BT[row, longest - len(ask.prompt) :] = 1
        torch.set_num_threads(self._num_threads)
        began_s = time.monotonic()
        output_BT = self._model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            adapter_names=[ask.adapter or "__base__" for ask in asks],
            do_sample=False,
            min_new_tokens=output_tokens,
            max_new_tokens=output_tokens,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([] if each_token is None else [each_token]),
        )
        wall_s = time.monotonic() - began_s
        return wall_s, [tuple(row[longest:].tolist()) for row in output_BT]
