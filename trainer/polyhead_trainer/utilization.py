"""Model FLOPs utilisation (PaLM, Chowdhery et al. 2022): the products that a step needs, by what the device could do.

A linear layer with n weights needs 2 n FLOPs a token forward, 2 n more backward for its input's gradient, and 2 n more
for its weight's. With all weights trained that is the known 6 N. An adapter's run needs less, and less is counted: no
weight gradients of what is frozen, and no input gradients before the first module that is trained. The LM head is
counted for label tokens alone, which are the only ones that it is computed for.

Virtual tokens are counted where a method puts them. Prompt tuning and P-tuning lengthen every example by them, and
P-tuning's encoder reads nothing else. A prefix is keys and values as it is; LLaMA-Adapter's prompts become keys and
values by the layers' own projections. What depends on no example is needed once a step.

Not counted: attention's own products (so that of long texts MFU comes out a little low), norms, activations, and work
that is done twice to save memory (activation checkpointing) or because peft cannot look inside of a layer (with
LLaMA-Adapter, queries and output projection).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT
from torch import nn
from transformers.pytorch_utils import Conv1D

from polyhead_trainer.loop import StepReport

DATA_SHEET_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 FLOP/s of NVIDIA's data sheets, for device names that hold the key; the first match counts."""
MATMUL_WIDTH = {"cpu": 768, "cuda": 4096}
MATMUL_REPEATS = 4
LENGTHENING = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)
"""Methods whose virtual tokens go through all layers."""
EXPERT_SETTINGS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    per_token: int
    per_label: int
    per_example: int = 0
    """Of the virtual tokens in front of each."""
    per_step: int = 0
    """Of what virtual tokens alone go through."""

    def of(self, report: StepReport, num_examples: float) -> float:
        each = self.per_token * report.num_tokens + self.per_label * report.num_labels
        return each + self.per_example * num_examples + self.per_step


@dataclass(frozen=True, kw_only=True)
class Peak:
    flops_per_s: float
    source: str
    """Where the figure comes from."""


@dataclass(kw_only=True)
class Utilization:
    flops: StepFlops
    measure_peak: Callable[[], Peak]
    """Of all ranks together."""
    examples_per_step: float
    """On average."""
    peak: Peak = field(init=False)
    """The best of what was measured so far: the processor may have been busy with other work."""

    def __post_init__(self) -> None:
        self.peak = self.measure_peak()

    def measure_again(self) -> None:
        self.peak = max(self.peak, self.measure_peak(), key=lambda peak: peak.flops_per_s)

    def share(self, history: Sequence[StepReport]) -> float:
        """MFU of these steps: 1 is all that the devices could do."""
        seconds = sum(report.seconds for report in history)
        flops = sum(self.flops.of(report, self.examples_per_step) for report in history)
        return flops / seconds / self.peak.flops_per_s if seconds else 0.0


def mean_batch(num_examples: int, batch_size: int) -> float:
    """Examples of a step, on average over an epoch: one of its batches may be smaller."""
    return num_examples / math.ceil(num_examples / batch_size)


def count_flops(model: nn.Module) -> StepFlops | None:
    """None for a mixture of experts, of which each token meets a part that cannot be told from the modules, and for an
    encoder-decoder, of which it meets one half."""
    config: Any = getattr(model, "config", None)
    if any(getattr(config, name, None) for name in (*EXPERT_SETTINGS, "is_encoder_decoder")):
        return None
    in_front = _in_front(model)
    reached = in_front is not None  # what stands before the prompt comes before all of the backbone
    head = _head_path(model)
    per_token = per_label = per_step = 0
    for path, module in model.named_modules():
        trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if isinstance(module, nn.Linear | Conv1D | nn.LSTM):
            flops = (2 + 2 * reached + 2 * _learns(module)) * _num_weights(module)
            if path.startswith("prompt_encoder."):
                per_step += in_front.num_virtual_tokens * flops
            elif head is not None and (path == head or path.startswith(f"{head}.")):
                per_label += flops
            else:
                per_token += flops
        reached = reached or trained
    lengthens = in_front is not None and in_front.peft_type in LENGTHENING
    return StepFlops(
        per_token=per_token,
        per_label=per_label,
        per_example=in_front.num_virtual_tokens * per_token if lengthens else 0,
        per_step=per_step + sum(_prompt_flops(module) for module in model.modules()),
    )


def _in_front(model: nn.Module) -> Any:
    """peft's settings of what a method learns in front of the prompt; None: it learns elsewhere."""
    settings: Any = model.active_peft_config if isinstance(model, PeftModel) else None
    return settings if settings is not None and settings.is_prompt_learning else None


def _prompt_flops(module: nn.Module) -> int:
    """Of LLaMA-Adapter's prompt on its way to keys and values, and of its gradient on the way back."""
    if not isinstance(module, AdaptedAttention | AdaptedAttentionGPT):
        return 0
    names = TRANSFORMERS_MODEL_CONFIG[module.model_type]
    layers = {getattr(module.model, name) for name in (names.k_proj_layer, names.v_proj_layer) if name is not None}
    return 4 * module.adapter_len * sum(map(_num_weights, layers))


def _learns(module: nn.Module) -> bool:
    """Whether its weights do: a bias takes no product."""
    return any(one.requires_grad for name, one in module.named_parameters(recurse=False) if name.startswith("weight"))


def _num_weights(module: nn.Linear | Conv1D | nn.LSTM) -> int:
    """From the widths: the weight itself may be packed, or in shards."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    if isinstance(module, nn.LSTM):
        return sum(weight.numel() for weights in module.all_weights for weight in weights if weight.ndim == 2)
    return int(module.nx) * int(module.nf)


def _head_path(model: nn.Module) -> str | None:
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return next((path for path, module in model.named_modules() if module is head), None) if head is not None else None


def peak_of(device: torch.device, dtypes: Sequence[torch.dtype], num_ranks: int) -> Peak:
    """Of the fastest of `dtypes`, in which the run multiplies. bfloat16 on a GPU of the table: its data sheet's;
    else the best of a few matmuls here and now, with this process's threads."""
    if device.type == "cuda" and torch.bfloat16 in dtypes:
        name = torch.cuda.get_device_name(device)
        for known, flops in DATA_SHEET_FLOPS.items():
            if known in name:
                return Peak(flops_per_s=flops * num_ranks, source=f"{num_ranks} x {known} in bfloat16, data sheet")
    measured = {dtype: _measured(device, dtype) for dtype in dtypes}
    fastest = max(measured, key=measured.__getitem__)
    name = str(fastest).removeprefix("torch.")
    source = f"{num_ranks} x a {name} matmul, measured"
    return Peak(flops_per_s=measured[fastest] * num_ranks, source=source)


def multiplied_dtypes(activations: torch.dtype, quantization: str) -> tuple[torch.dtype, ...]:
    """Quantised weights meet activations in fewer bits than these have: bfloat16 stands for what a device does then."""
    return (activations,) if quantization == "none" else tuple({activations, torch.bfloat16})


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s."""
    width = MATMUL_WIDTH[device.type]
    left = torch.ones(width, width, device=device, dtype=dtype)  # no random numbers: they are the training's
    return 2 * width**3 / min(_seconds(left) for _ in range(MATMUL_REPEATS))


def _seconds(matrix: torch.Tensor) -> float:
    started = time.perf_counter()
    matrix @ matrix
    if matrix.device.type == "cuda":
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - started
