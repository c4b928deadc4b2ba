"""Tiny random backbones, adapters that peft itself makes for them, and the slow definition of what an adapter does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from polyhead_core.adapter_directory import CONFIG_FILE, WEIGHTS_FILE
from polyhead_core.backbone.model import site_map
from polyhead_core.kernels import reference
from polyhead_core.kernels.tables import AdapterTables
from polyhead_core.sites import SiteKind, SiteMap

VOCAB = 128


@dataclass(frozen=True)
class TinyBackbone:
    """Has the attributes of polyhead_core.backbone.Backbone that the store needs."""

    model: PreTrainedModel
    fingerprint: str = "tiny"
    quantization: str = "none"
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def sites(self) -> SiteMap:
        return site_map(self.model)


def llama(*, tied: bool = False, bias: bool = False, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        tie_word_embeddings=tied,
        attention_bias=bias,
    )
    return _with_random_biases(LlamaForCausalLM(config))


def gpt_neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    return _with_random_biases(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, **shape)))


def gemma2() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCAB, num_key_value_heads=2, head_dim=16, **shape)).eval()


def _with_random_biases(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_adapter(
    directory: Path, model: PreTrainedModel, *, seed: int = 1, save_embedding_layers: bool | str = "auto", **config: Any
) -> PeftModel:
    """Wraps `model` in place, fills the adapter with random numbers, saves it with peft; returns the peft model."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
            elif name.endswith(".bias") and parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        wrapped.save_pretrained(directory, save_embedding_layers=save_embedding_layers)
    return wrapped


def edit_adapter(directory: Path, edit: Callable[[dict[str, Any], dict[str, Tensor], dict[str, str]], object]) -> None:
    """Rewrites an adapter after `edit` has changed its (config, tensors, metadata) in place."""
    config = json.loads((directory / CONFIG_FILE).read_text())
    tensors, metadata = load_file(directory / WEIGHTS_FILE), {"format": "pt"}
    edit(config, tensors, metadata)
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    tensors = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, directory / WEIGHTS_FILE, metadata=metadata)


@contextmanager
def served_by_tables(backbone: TinyBackbone, tables: AdapterTables, slot: int) -> Iterator[None]:
    """Adds, at every site of the untouched backbone, what the reference kernels read out of the tables for `slot`."""

    def hook_for(site_index: int, kind: SiteKind) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            y = output.clone().view(-1, output.shape[-1])
            slots = torch.full((y.shape[0],), slot)
            if kind is SiteKind.EMBED:
                reference.embedding_add(y, inputs[0].view(-1), tables, site_index, slots, VOCAB)
            else:
                reference.low_rank_add(y, inputs[0].view(-1, inputs[0].shape[-1]), tables, site_index, slots)
            return y.view(output.shape)

        return hook

    modules = dict(backbone.model.named_modules())
    handles = [modules[site.path].register_forward_hook(hook_for(site.index, site.kind)) for site in backbone.sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(model: nn.Module, tokens: tuple[int, ...] = (1, 7, 100, 3, 3)) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits
