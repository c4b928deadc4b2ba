"""What a user of peft has today: bitsandbytes' int8 layers and one LoRA adapter a row, named by adapter_names."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from serving_workload import TARGETS
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from polyhead_core.backbone.load import replace_module

STEPS = 5


@torch.inference_mode()
def peft_step_seconds(
    config: LlamaConfig, device: torch.device, rows: int, rank: int, context: int, seed: int
) -> float:
    """Median seconds of a decode step of `rows` rows, each with an adapter of its own, after `context` tokens each."""
    torch.manual_seed(seed)
    with torch.device(device):  # in float16, to which bitsandbytes would cast other types
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float16).eval()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            replace_module(model, path, _int8_layer(module, device))
    adapters = [f"a{number}" for number in range(rows)]
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(model, settings, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, settings)
    model.to(device).eval()
    cache = DynamicCache()
    model(
        input_ids=torch.randint(config.vocab_size, (rows, context), device=device), past_key_values=cache,
        use_cache=True, adapter_names=adapters, logits_to_keep=1,
    )  # fmt: skip
    seconds = []
    for _ in range(STEPS + 1):
        tokens = torch.randint(config.vocab_size, (rows, 1), device=device)
        began_s = time.perf_counter()
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, adapter_names=adapters).logits
        logits[:, -1].argmax(-1).tolist()
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds[1:])


def _int8_layer(module: nn.Linear, device: torch.device) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(
        module.in_features, module.out_features, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    weight = module.weight.data.to("cpu", torch.float16)  # quantised on the way to the device
    layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to(device)
