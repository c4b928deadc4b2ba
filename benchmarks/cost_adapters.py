"""LoRA adapters in any number, in PEFT's own format, made in milliseconds each: random weights by a seed.

One adapter of each rank comes from peft itself; all others have its configuration and its tensors' names and shapes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from serving_workload import LORA_B_SCALE, TARGETS
from torch import Tensor
from transformers import AutoModelForCausalLM

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


class AdapterWriter:
    """Writes adapter number k with rank ranks[k % len(ranks)], on every linear layer of the blocks, in bfloat16."""

    def __init__(self, backbone_directory: Path, scratch: Path, ranks: Sequence[int], seed: int) -> None:
        self._ranks = tuple(ranks)
        self._seed = seed
        self._templates = {rank: scratch / f"rank{rank}" for rank in set(ranks)}
        model: Any = AutoModelForCausalLM.from_pretrained(backbone_directory, dtype=torch.bfloat16)
        for rank, folder in self._templates.items():
            config = LoraConfig(
                r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"
            )
            adapted = get_peft_model(model, config)
            adapted.save_pretrained(str(folder), safe_serialization=True)
            model = adapted.unload()
        self._shapes = {rank: _shapes(folder) for rank, folder in self._templates.items()}

    def write(self, folder: Path, number: int) -> None:
        """The same number gives the same bytes."""
        rank = self._ranks[number % len(self._ranks)]
        folder.mkdir(parents=True)
        shutil.copy(self._templates[rank] / CONFIG_FILE, folder / CONFIG_FILE)
        save_file(self._draw(rank, number), folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def _draw(self, rank: int, number: int) -> dict[str, Tensor]:
        return draw_lora(self._shapes[rank], self._seed * 1_000_003 + number)


def draw_lora(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """A and B as peft draws them: uniform in 1 / sqrt(fan in); B smaller, so that no model turns chaotic."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        bound = shape[1] ** -0.5 * (LORA_B_SCALE if ".lora_B." in name else 1.0)
        tensors[name] = torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator).to(torch.bfloat16)
    return tensors


def _shapes(folder: Path) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in load_file(folder / WEIGHTS_FILE).items()}


def adapter_name(number: int) -> str:
    return f"tune{number:04d}"


def file_bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE))


def lora_deltas(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """By module path: (A [r, in], scale * B [out, r]) in float32, of an adapter that `AdapterWriter` wrote."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / WEIGHTS_FILE)
    deltas = {}
    for name, a_RI in tensors.items():
        if name.endswith(".lora_A.weight"):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b_OR = tensors[name.replace(".lora_A.", ".lora_B.")]
            deltas[path] = (a_RI.float(), scale * b_OR.float())
    return deltas
