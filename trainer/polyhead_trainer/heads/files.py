"""A head's directory: adapter_config.json and adapter_model.safetensors, as peft names them, with a type of our own.

peft itself cannot hold a head without an adapter (NoMatchingPeftModuleError at load in peft 0.21). The configuration:
{"peft_type": "HEAD", "task_type": "SEQ_CLS", "base_model_name_or_path": ..., "labels": [...], "hidden": [...],
"activation": "gelu", "pooling": "last_token"}. The tensors, float32: `score.weight` [labels, width], and for added
layers `score.dense.N.weight` [width, previous width] with `score.dense.N.bias` [width].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor
from transformers import PreTrainedModel

from polyhead_core.adapter_directory import CONFIG_FILE, WEIGHTS_FILE, read_adapter_directory
from polyhead_core.backbone import Backbone
from polyhead_core.errors import AdapterFormatError, AdapterMismatch
from polyhead_trainer.backbones import check_trained_on
from polyhead_trainer.heads.modules import ScoreHead, classifier

HEAD_TYPE = "HEAD"
PREFIX = "score."


def save_head(head: ScoreHead, labels: list[str], base_model: str, directory: Path) -> None:
    config = {
        "peft_type": HEAD_TYPE,
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base_model,
        "labels": labels,
        "hidden": head.hidden,
        "activation": "gelu",
        "pooling": "last_token",
        "inference_mode": True,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    safetensors.torch.save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def is_head_directory(directory: Path) -> bool:
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == HEAD_TYPE


def load_head(backbone: Backbone, directory: Path) -> PreTrainedModel:
    """A classifier around the backbone's layers with the head from `directory`.

    The labels are in its `config.id2label`. Raises AdapterRejected and its kin.
    """
    files = read_adapter_directory(directory.resolve())
    labels: Any = files.config.get("labels")
    hidden: Any = files.config.get("hidden")
    if files.config.get("peft_type") != HEAD_TYPE or not _list_of(labels, str) or not _list_of(hidden, int):
        raise AdapterFormatError(
            f"adapter {files.name!r}: expected peft_type {HEAD_TYPE!r} with lists `labels` and `hidden`, "
            f"got {files.config.get('peft_type')!r}, {labels!r} and {hidden!r}"
        )
    check_trained_on(backbone, directory, files.backbone_fingerprint)
    model: Any = classifier(backbone, labels, hidden=hidden, seed=0)
    _fill(model.score, files.tensors, files.name)
    assert isinstance(model, PreTrainedModel)
    return model


def _fill(head: ScoreHead, tensors: dict[str, Tensor], adapter: str) -> None:
    expected = {PREFIX + name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise AdapterMismatch(f"adapter {adapter!r}: its head needs the tensors {expected}, the file holds {found}")
    head.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})


def _list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
