"""Tiny random encoder-decoders of several trees: shared and separate embeddings, learned and computed positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    M2M100Config,
    MT5Config,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
)

from tiny import VOCAB, tokenizer

_TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 2}
_T5: dict[str, Any] = {
    **_TOKENS,
    "d_model": 64,
    "d_ff": 96,
    "d_kv": 16,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
_BART: dict[str, Any] = {
    **_TOKENS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "bos_token_id": 1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
    "scale_embedding": True,
    "dropout": 0.0,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "t5": T5Config(**_T5),
    "t5-own-head": T5Config(**_T5, tie_word_embeddings=False),
    "mt5": MT5Config(**_T5),
    "bart": BartConfig(**_BART),
    "m2m100": M2M100Config(**{**_BART, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}),
}


def make_encoder_decoder(kind: str, **changes: Any) -> PreTrainedModel:
    """With weights large enough that outputs differ from token to token, and a head of its own where `kind` says so."""
    config = type(CONFIGS[kind])(**{**CONFIGS[kind].to_dict(), **changes})
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.6 if "shared" in name else 0.1)
    if kind == "bart":
        torch.nn.init.normal_(model.final_logits_bias)
    if kind == "t5-own-head":
        # from_config shares them whatever the configuration says (seen in transformers 5.23); loading does not.
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, config.d_model))
    return model  # type: ignore[no-any-return]


def save_encoder_decoder(
    directory: Path, kind: str = "t5", *, stored: torch.dtype = torch.float32, **changes: Any
) -> Path:
    make_encoder_decoder(kind, **changes).to(stored).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory
