"""Methods that put something learned in front: embeddings, keys and values, or gated prompts in the layers; by peft.

n virtual tokens, H hidden width, L layers, K heads of keys and values, D their width.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaptionPromptConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import Tensor

from polyhead_core.adapter_directory import read_adapter_directory
from polyhead_core.backbone import Backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer.backbones import check_trained_on
from polyhead_trainer.config import LlamaAdapterSettings, PrefixSettings, PromptSettings, PTuningSettings
from polyhead_trainer.methods.peft_tuned import PeftTuned, check_same_tensors, task_type, wrap


def prompt_tuning(backbone: Backbone, settings: PromptSettings) -> PeftTuned:
    config = PromptTuningConfig(task_type=task_type(backbone.model), num_virtual_tokens=settings.num_virtual_tokens)
    tokens = _initial_tokens(backbone, settings.init_text, settings.num_virtual_tokens)
    table: Any = backbone.model.get_input_embeddings()
    with torch.no_grad():
        initial_nH = table(tokens).float()
    return _in_front(backbone, config, settings, initial_nH)


def prefix_tuning(backbone: Backbone, settings: PrefixSettings) -> PeftTuned:
    config = PrefixTuningConfig(task_type=task_type(backbone.model), num_virtual_tokens=settings.num_virtual_tokens)
    tokens = _initial_tokens(backbone, settings.init_text, settings.num_virtual_tokens)
    return _in_front(backbone, config, settings, _keys_and_values(backbone, tokens))


def p_tuning(backbone: Backbone, settings: PTuningSettings) -> PeftTuned:
    config = PromptEncoderConfig(
        task_type=task_type(backbone.model),
        num_virtual_tokens=settings.num_virtual_tokens,
        encoder_reparameterization_type=settings.encoder.upper(),
        encoder_hidden_size=settings.encoder_hidden_size,
    )
    if settings.warm_start is not None:
        raise ConfigError(
            f"adapter.warm_start = {settings.warm_start}: P-tuning folds its encoder at save, so that none is left to "
            "go on with; start a run with adapter.method = prompt_tuning from its embeddings"
        )
    return _in_front(backbone, config, settings, None)


def llama_adapter(backbone: Backbone, settings: LlamaAdapterSettings) -> PeftTuned:
    num_layers = int(backbone.model.config.num_hidden_layers)
    chosen = settings.adapter_layers or max(1, num_layers - 2)
    if chosen > num_layers:
        raise ConfigError(f"adapter.adapter_layers = {chosen}: the backbone has {num_layers} layers")
    config = AdaptionPromptConfig(
        task_type=task_type(backbone.model), adapter_len=settings.adapter_len, adapter_layers=chosen
    )
    return PeftTuned(wrap(backbone, config, settings.warm_start))


def _in_front(backbone: Backbone, config: Any, settings: Any, initial: Tensor | None) -> PeftTuned:
    model = wrap(backbone, config)
    if initial is not None:
        encoder: Any = model.prompt_encoder["default"]
        with torch.no_grad():
            encoder.embedding.weight.copy_(initial)
    if settings.warm_start is not None:
        _continue(model, settings, backbone)
    return PeftTuned(model)


def _continue(model: PeftModel, settings: Any, backbone: Backbone) -> None:
    files = read_adapter_directory(settings.warm_start.resolve())
    check_trained_on(backbone, settings.warm_start, files.backbone_fingerprint)
    encoder: Any = model.prompt_encoder["default"]
    check_same_tensors(settings.warm_start, files.tensors, {"prompt_embeddings": encoder.embedding.weight})
    with torch.no_grad():
        encoder.embedding.weight.copy_(files.tensors["prompt_embeddings"])


def _initial_tokens(backbone: Backbone, text: str | None, count: int) -> Tensor:
    """[n] token ids. Raises ConfigError for a text without tokens."""
    if text is None:
        return torch.randint(0, int(backbone.model.config.vocab_size), (count,)).to(backbone.device)
    ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"adapter.init_text = {text!r} has no tokens")
    return torch.tensor((ids * (count // len(ids) + 1))[:count], device=backbone.device)


@torch.no_grad()
def _keys_and_values(backbone: Backbone, tokens_n: Tensor) -> Tensor:
    """[n, L * 2 * K * D]: of each token by layer its key, then its value, as peft lays a prefix out."""
    cache: Any = backbone.model(input_ids=tokens_n.unsqueeze(0), use_cache=True).past_key_values
    parts = [part[0].transpose(0, 1).flatten(1) for layer in cache.layers for part in (layer.keys, layer.values)]
    return torch.cat(parts, dim=1).float()
