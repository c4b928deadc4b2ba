"""The frozen model to train on: the server's own, or bitsandbytes' LLM.int8 or NF4 made from the same files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
)

from polyhead_core.backbone import Backbone, load_backbone
from polyhead_core.backbone.checkpoint import fingerprint
from polyhead_core.backbone.source import resolve_source
from polyhead_core.backbone.typed_copy import typed_directory
from polyhead_core.devices import check_device
from polyhead_core.errors import AdapterMismatch, BackboneError, ConfigError
from polyhead_core.paths import default_cache_dir
from polyhead_trainer.config import BackboneSection

HUB_NAMES = {"default": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""What peft's `base_model_name_or_path` says for backbones that are not named by themselves."""


BY_BITSANDBYTES = ("llm.int8", "nf4")
"""Quantisations that it makes of float weights while transformers loads them."""


def on_host(settings: BackboneSection) -> BackboneSection:
    """The same weights, left on the host until each rank has taken its part of them.

    There they are pages of a file, which all ranks of a host share (see load's `shared`): none of them holds the whole
    model by itself.
    """
    return settings.model_copy(update={"device": "cpu", "dtype": str(compute_dtype(settings)).removeprefix("torch.")})


def of_rank(settings: BackboneSection, device: torch.device) -> BackboneSection:
    """What one of several ranks loads that computes on `device`.

    bitsandbytes quantises for the device that it loads to, and what it has quantised is not sharded: every rank needs
    the whole model by itself.
    """
    if settings.quantization in BY_BITSANDBYTES:
        return settings.model_copy(update={"device": str(device)})
    return on_host(settings)


def compute_dtype(settings: BackboneSection) -> torch.dtype:
    """Of the activations."""
    if settings.dtype == "auto":
        return torch.float32 if torch.device(settings.device).type == "cpu" else torch.bfloat16
    found: torch.dtype = getattr(torch, settings.dtype)
    return found


def load(settings: BackboneSection, *, shared: bool = False) -> Backbone:
    """`shared`: by several processes of a host, as load_backbone has it; bitsandbytes' types are each process's own all
    the same. Raises BackboneError, ConfigError."""
    check_device(settings.device, "backbone.device")
    directory = resolve_source(settings.source, settings.cache_dir or default_cache_dir())
    check_loadable(settings, directory)
    if settings.quantization in BY_BITSANDBYTES or is_encoder_decoder(directory):
        return _load_by_transformers(settings, directory, shared=shared)
    return load_backbone(
        settings.source,
        quantization=settings.quantization,
        dtype=settings.dtype,
        device=settings.device,
        cache_dir=settings.cache_dir,
        shared=shared,
    )


def check_loadable(settings: BackboneSection, directory: Path) -> None:
    """Raises ConfigError, BackboneError."""
    if settings.quantization == "int8" and is_encoder_decoder(directory):
        raise ConfigError(
            f"backbone.quantization = int8 is made for decoder-only models, and {settings.source!r} is an "
            "encoder-decoder: set backbone.quantization = none or llm.int8"
        )
    if settings.quantization == "nf4" and torch.device(settings.device).type == "cpu":
        raise ConfigError(
            "backbone.quantization = nf4 on the CPU: bitsandbytes' four bits barely learn there, and come back wrong "
            "from a file; set backbone.device = cuda, or backbone.quantization = int8"
        )


def is_encoder_decoder(directory: Path) -> bool:
    """Raises BackboneError."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(f"cannot read {directory / 'config.json'}: {error}") from error
    return config.is_encoder_decoder


def check_trained_on(backbone: Backbone, directory: Path, named: str | None) -> None:
    """Raises AdapterMismatch where `directory` names the fingerprint of another backbone; None: it names none."""
    if named not in (None, backbone.fingerprint):
        raise AdapterMismatch(
            f"{directory} was trained on the backbone with fingerprint {named}, "
            f"{backbone.source!r} has {backbone.fingerprint}: name the right backbone (backbone.source, --backbone)"
        )


def quantization_config(name: str, compute: torch.dtype) -> BitsAndBytesConfig:
    """For one of BY_BITSANDBYTES. NF4 as QLoRA has it (Dettmers et al. 2023), double quantisation included."""
    if name == "llm.int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _load_by_transformers(settings: BackboneSection, directory: Path, *, shared: bool) -> Backbone:
    """LLM.int8 and NF4, and encoder-decoders, which the server's own loading and int8 do not know.

    transformers makes the model on the meta device and puts the file's own pages in, unless they have to change their
    type; it knows which of an architecture's tensors are one and the same.
    """
    # It warns in every product that it computes in float16, which is how LLM.int8 is defined.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    device = torch.device(settings.device)
    dtype = compute_dtype(settings)
    cache = settings.cache_dir or default_cache_dir()
    identity = fingerprint(directory, cache)
    loader = AutoModelForSeq2SeqLM if is_encoder_decoder(directory) else AutoModelForCausalLM
    weights = directory
    more: dict[str, Any] = {}
    if settings.quantization in BY_BITSANDBYTES:
        more["quantization_config"] = quantization_config(settings.quantization, dtype)
    elif shared:
        weights = typed_directory(directory, identity, dtype, cache)
        # A cached copy holds weights alone.
        more = {"config": AutoConfig.from_pretrained(directory), "generation_config": _generation_config(directory)}
    model = loader.from_pretrained(weights, dtype=dtype, device_map={"": device}, **more)
    return Backbone(
        model=model.eval().requires_grad_(False),
        tokenizer=AutoTokenizer.from_pretrained(directory),
        source=settings.source,
        directory=directory,
        fingerprint=identity,
        quantization=settings.quantization,
        dtype=dtype,
        device=device,
    )


def _generation_config(directory: Path) -> GenerationConfig:
    """Of a file of its own, or of the model's configuration, where older models have it."""
    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig.from_model_config(json.loads((directory / "config.json").read_text(encoding="utf-8")))
