"""What peft's methods share: wrapping a backbone, and peft's files at the end."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from polyhead_core.adapter_directory import CONFIG_FILE, read_adapter_directory, stamp_backbone
from polyhead_core.backbone import Backbone
from polyhead_core.errors import AdapterMismatch, ConfigError
from polyhead_core.int8 import Int8Linear
from polyhead_trainer.backbones import HUB_NAMES, check_trained_on
from polyhead_trainer.methods.tuned import TrainedAtOneRate

HINT = "give the [adapter] settings that it was trained with (`trainer inspect` shows them)"
"""For one that a run cannot start from."""
SETS = ("target_modules", "feedforward_modules", "exclude_modules", "modules_to_save")
"""In peft's configurations."""


@dataclass
class PeftTuned(TrainedAtOneRate):
    """Implements Tuned."""

    model: PeftModel
    save_embedding_layers: bool = False
    is_adapter: bool = True

    @property
    def saves_frozen(self) -> bool:
        return self.save_embedding_layers

    @contextmanager
    def baseline(self) -> Iterator[None]:
        with self.model.disable_adapter():
            yield

    def save(self, directory: Path, *, fingerprint: str, quantization: str) -> str:
        self.model.save_pretrained(str(directory), save_embedding_layers=self.save_embedding_layers)
        return stamp(directory, fingerprint=fingerprint, quantization=quantization)


def stamp(directory: Path, *, fingerprint: str, quantization: str) -> str:
    """Completes what peft has saved with the backbone's identity; returns its own.

    peft writes sets of names in an order that differs from process to process: equal adapters would have unequal
    identities.
    """
    file = directory / CONFIG_FILE
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for key, value in config.items():
        if key in SETS and isinstance(value, list):
            config[key] = sorted(value)
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return stamp_backbone(directory, fingerprint=fingerprint, quantization=quantization)


def task_type(model: nn.Module) -> str:
    """peft's name for what the model's output is; for a classifier peft trains and saves `score` as well."""
    if hasattr(model, "score"):
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def reload_peft(backbone: Backbone, directory: Path) -> PeftModel:
    """The backbone with an adapter that peft reads. Raises AdapterMismatch."""
    try:
        model = PeftModel.from_pretrained(backbone.model, str(directory))
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise AdapterMismatch(f"peft cannot put {directory} on {backbone.source!r}: {error}") from error
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.forget_packed()  # it may hold a bias that the adapter replaces
    return model


def wrap(backbone: Backbone, config: PeftConfig, warm_start: Path | None = None) -> PeftModel:
    """Raises ConfigError; with `warm_start`, AdapterRejected and its kin as well."""
    try:
        with warnings.catch_warnings():
            # Of a pattern that no module matches: a run would go on without it.
            warnings.filterwarnings("error", message=".*_pattern keys did not match", category=RuntimeWarning)
            model = get_peft_model(backbone.model, config)
    except (ValueError, IndexError, TypeError, AttributeError, re.error, RuntimeWarning) as error:
        raise ConfigError(f"peft refuses the [adapter] settings on this backbone: {error}") from error
    model.peft_config["default"].base_model_name_or_path = HUB_NAMES.get(backbone.source, backbone.source)
    if warm_start is not None:
        _start_from(cast(PeftModel, model), warm_start, backbone)
    return cast(PeftModel, model)


def _start_from(model: PeftModel, directory: Path, backbone: Backbone) -> None:
    files = read_adapter_directory(directory.resolve())
    check_trained_on(backbone, directory, files.backbone_fingerprint)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    check_same_tensors(directory, files.tensors, wanted)
    _check_same_effect(directory, files.config, model.peft_config["default"].to_dict())
    set_peft_model_state_dict(model, files.tensors)


def _check_same_effect(directory: Path, given: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Equal tensors can still act differently. Raises AdapterMismatch."""
    for key in ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora"):
        if key in wanted and given.get(key, wanted[key]) != wanted[key]:
            raise AdapterMismatch(
                f"{directory} has {key} = {given[key]}, where the settings make it {wanted[key]}: its weights would "
                f"not act as they were trained to; {HINT}"
            )


def check_same_tensors(directory: Path, given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raises AdapterMismatch naming the first tensor that is there too much, is missing, or has another shape."""
    for name in sorted(given.keys() ^ wanted.keys()):
        what = "holds" if name in given else "lacks"
        raise AdapterMismatch(f"{directory} {what} {name}, unlike the adapter that the settings describe; {HINT}")
    for name, tensor in sorted(wanted.items()):
        if given[name].shape != tensor.shape:
            raise AdapterMismatch(
                f"{directory}: {name} is {list(given[name].shape)}, where the settings make it "
                f"{list(tensor.shape)}; {HINT}"
            )
