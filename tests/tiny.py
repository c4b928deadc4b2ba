"""Tiny random backbones with real tokenizers, and real PEFT adapters for them: what tests load in place of big ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 288
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**_GROUPED, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=16),
    "mistral": MistralConfig(**_GROUPED, sliding_window=24),
    "gemma": GemmaConfig(**_GROUPED, head_dim=16),
    "gpt_neox": GPTNeoXConfig(**_SHAPE),
    "phi": PhiConfig(**_SHAPE),
}
"""By architecture; what an adapter may target there is TARGETS."""

TARGETS: dict[str, list[str]] = {
    **{
        kind: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        for kind in ("llama", "llama-untied", "qwen2", "qwen3", "mistral", "gemma")
    },
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, so that any text has tokens; with an end token, a control token and a chat template."""
    special = ["<pad>", "<s>", "</s>", "<|control|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|control|>"],
    )
    fast.chat_template = (
        "{% for m in messages %}<|control|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|control|>assistant\n{% endif %}"
    )
    return fast


def save_backbone(kind: str, directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A random model of this architecture with weights large enough that its outputs differ from token to token."""
    config = type(CONFIGS[kind])(**{**CONFIGS[kind].to_dict(), **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.6 if "embed" in name else 0.18)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def reference_model(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def save_adapter(
    backbone: Path,
    directory: Path,
    *,
    seed: int,
    scale: float = 0.3,
    save_embedding_layers: bool | str = False,
    **settings: Any,
) -> Path:
    """A LoRA adapter as PEFT saves it, with random factors: `settings` are LoraConfig's."""
    model = get_peft_model(reference_model(backbone), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            spread = 1.0 if "lora_A" in name or "embedding_A" in name else scale
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread / fan_in**0.5
    model.save_pretrained(directory, save_embedding_layers=save_embedding_layers)
    return directory
