"""A backbone of any Llama shape with random int8 weights, made on the device: for speed, where no weights are at hand.

Weights are never zeros: a processor may be quicker over those. Every layer is smoothed and has outlier columns, as
converted backbones have.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from cost_adapters import CONFIG_FILE, WEIGHTS_FILE, adapter_name, draw_lora
from cost_bytes import LLAMA_2_7B
from peft import LoraConfig
from safetensors.torch import save_file
from serving_workload import TARGETS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from polyhead_core.backbone import Backbone
from polyhead_core.backbone.calibrate import MAX_OUTLIER_COLUMNS
from polyhead_core.backbone.embedding import CastEmbedding
from polyhead_core.backbone.load import replace_module
from polyhead_core.int8 import Int8Linear

SHAPES = {
    "tiny": LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=320
    ),
    "llama-2-7b": LLAMA_2_7B,
    "llama-2-13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, vocab_size=32000
    ),
}  # fmt: skip
_WEIGHT_STD = 0.02


def random_model(shape: str, device: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """As transformers draws it, in floating point."""
    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(copy.deepcopy(SHAPES[shape]), dtype=dtype).eval()


def random_backbone(shape: str, device: torch.device, dtype: torch.dtype, seed: int) -> Backbone:
    config = copy.deepcopy(SHAPES[shape])  # the engine writes its attention into it
    generator = torch.Generator(device).manual_seed(seed)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    model.eval()
    inputs: dict[str, tuple[Tensor, Tensor]] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            # As after a calibration, layers with the same input quantise it in the same way.
            reader = path if path.endswith(("o_proj", "down_proj")) else path.rpartition(".")[0] or path
            if reader not in inputs:
                inputs[reader] = _random_quantisation(module.in_features, generator)
            replace_module(model, path, _random_linear(module, *inputs[reader], generator))
        elif isinstance(module, nn.Embedding):
            table = torch.empty(module.weight.shape, device=device, dtype=dtype).normal_(generator=generator)
            replace_module(model, path, CastEmbedding(table, dtype))
        else:
            for name, parameter in module.named_parameters(recurse=False):
                ones = torch.ones(parameter.shape, device=device, dtype=dtype)
                module.register_parameter(name, nn.Parameter(ones, requires_grad=False))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return as_backbone(model, shape, "int8")


def as_backbone(model: PreTrainedModel, shape: str, quantization: str) -> Backbone:
    embedding = model.get_input_embeddings().weight
    return Backbone(
        model=model.requires_grad_(False), tokenizer=word_tokenizer(model.config.vocab_size),
        source=f"random {shape}", directory=Path(), fingerprint=f"random-{shape}", quantization=quantization,
        dtype=embedding.dtype, device=embedding.device,
    )  # fmt: skip


def _random_quantisation(width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Smoothing scale and outlier columns."""
    scale = torch.rand(width, generator=generator, device=generator.device) + 0.5
    columns = torch.randperm(width, generator=generator, device=generator.device)
    return scale, columns[: min(MAX_OUTLIER_COLUMNS, width // 16)].sort().values


def _random_linear(
    module: nn.Linear, input_scale: Tensor, outlier_columns: Tensor, generator: torch.Generator
) -> Int8Linear:
    width, outputs, device = module.in_features, module.out_features, generator.device
    weight = torch.randint(-127, 128, (outputs, width), generator=generator, device=device, dtype=torch.int8)
    absmax = torch.full((outputs,), _WEIGHT_STD * 3**0.5, device=device)  # of a uniform distribution of that deviation
    layer = Int8Linear(width, outputs, device="meta")
    layer.set_int8(weight, absmax, None, input_scale, outlier_columns)
    layer.eval()
    return layer


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word for each token, whose text nobody reads."""
    words = {f"w{number}": number for number in range(vocab_size)}
    model = Tokenizer(WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="w0", pad_token="w0", eos_token="w1")


def write_random_adapters(
    folder: Path, backbone: Backbone, count: int, rank: int, targets: Sequence[str] = TARGETS, seed: int = 0
) -> list[str]:
    """`count` LoRA adapters in PEFT's format, bfloat16. Their configurations differ, and their weights are one file:
    the server cannot know, and reads, packs and keeps each for itself."""
    first = folder / "weights"
    first.mkdir(parents=True)
    shapes = {}
    for site in backbone.sites:
        if site.path.rpartition(".")[2] in targets:
            name = f"base_model.model.{site.path}"
            shapes[f"{name}.lora_A.weight"] = (rank, site.in_features)
            shapes[f"{name}.lora_B.weight"] = (site.out_features, rank)
    save_file(draw_lora(shapes, seed), first / WEIGHTS_FILE, metadata={"format": "pt"})
    LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), task_type="CAUSAL_LM").save_pretrained(str(first))
    config = json.loads((first / CONFIG_FILE).read_text(encoding="utf-8"))
    names = [adapter_name(number) for number in range(count)]
    for name in names:
        (folder / "adapters" / name).mkdir(parents=True)
        os.link(first / WEIGHTS_FILE, folder / "adapters" / name / WEIGHTS_FILE)
        (folder / "adapters" / name / CONFIG_FILE).write_text(json.dumps(config | {"revision": name}), encoding="utf-8")
    return names
