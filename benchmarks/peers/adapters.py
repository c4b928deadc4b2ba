"""Random LoRA adapters in PEFT's own format, from a seed: peft writes one, all others have its names and shapes."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHT_STD = 0.01
"""Small: answers change, and the model does not turn chaotic. The speed does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class AdapterSet:
    name: str
    rank: int
    targets: tuple[str, ...]
    count: int

    @property
    def names(self) -> list[str]:
        return [f"{self.name}-{number:04d}" for number in range(self.count)]


def write_adapters(folder: Path, backbone_directory: Path, wanted: AdapterSet, seed: int) -> Path:
    """The folder of `wanted`, whose sub-folders are PEFT directories; every one has its own weights, in bfloat16."""
    target = folder / wanted.name
    template = folder / f".{wanted.name}-template"
    _write_template(template, backbone_directory, wanted)
    with safe_open(template / _WEIGHTS, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    for number, name in enumerate(wanted.names):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        (target / name).mkdir(parents=True)
        shutil.copy(template / _CONFIG, target / name / _CONFIG)
        tensors = {
            key: (WEIGHT_STD * torch.randn(shape, generator=generator)).bfloat16() for key, shape in shapes.items()
        }
        save_file(tensors, target / name / _WEIGHTS, metadata={"format": "pt"})
    shutil.rmtree(template)
    return target


def _write_template(template: Path, backbone_directory: Path, wanted: AdapterSet) -> None:
    # Without weights: only names and shapes are wanted of it.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(backbone_directory), dtype=torch.bfloat16)
    config = LoraConfig(
        r=wanted.rank, lora_alpha=wanted.rank, target_modules=list(wanted.targets), task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    adapted.to_empty(device="cpu")
    adapted.save_pretrained(template, safe_serialization=True, save_embedding_layers=False)
    written = json.loads((template / _CONFIG).read_text())
    written["base_model_name_or_path"] = None  # the same files wherever the backbone lies
    (template / _CONFIG).write_text(json.dumps(written, indent=2))
