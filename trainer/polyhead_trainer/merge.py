"""`trainer merge`: an adapter folded into a float copy of its backbone, as a directory that transformers loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from polyhead_core.adapter_directory import AdapterDirectory, read_adapter_directory
from polyhead_core.backbone import resolve_source
from polyhead_core.backbone.load import is_int8_checkpoint
from polyhead_trainer import backbones
from polyhead_trainer.backbones import HUB_NAMES, check_trained_on
from polyhead_trainer.config import BackboneSection
from polyhead_trainer.errors import MergeRefused
from polyhead_trainer.record import read_record
from polyhead_trainer.staging import new_directory

MERGEABLE = ("LORA", "IA3")
"""Types whose effect is a change of the backbone's weights; the others act on what flows through it."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    output: Path
    source: str
    trained_on: str | None
    """The quantisation of the backbone that the adapter was trained on."""


def merge(
    adapter: Path,
    output: Path,
    *,
    backbone: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    cache_dir: Path | None = None,
) -> Merged:
    """Merges in float32, then writes in `dtype`.

    `backbone` is its source; unset, the one that the adapter names. Raises MergeRefused, BackboneError, AdapterRejected
    and its kin, OutputExists.
    """
    files = read_adapter_directory(adapter.resolve())
    if files.config.get("peft_type") not in MERGEABLE:
        raise MergeRefused(
            f"{adapter} is of type {files.config.get('peft_type')}: only {' and '.join(MERGEABLE)} are changes of "
            "weights that a backbone can take over; serve it as an adapter"
        )
    if files.config.get("task_type") == "SEQ_CLS":
        raise MergeRefused(
            f"{adapter} is a classifier's: its trained scores have no place in a language model, and would be lost; "
            "use it as an adapter, or train adapter.method = full, whose output is a whole classifier"
        )
    source = backbone or backbone_of(adapter, files)
    _refuse_int8(source, cache_dir)
    with new_directory(output) as staging:
        section = BackboneSection(source=source, quantization="none", dtype="float32", cache_dir=cache_dir)
        loaded = backbones.load(section)
        check_trained_on(loaded, adapter, files.backbone_fingerprint)
        _untie(loaded.model, files)
        model = _merged(loaded.model, adapter, files)
        nn.Module.to(model, dtype=getattr(torch, dtype))
        model.config.dtype = getattr(torch, dtype)
        model.save_pretrained(staging)
        loaded.tokenizer.save_pretrained(staging)
    return Merged(output=output, source=source, trained_on=files.quantization)


def backbone_of(adapter: Path, files: AdapterDirectory) -> str:
    """The source that the run's record names, else peft's base model. Raises MergeRefused."""
    record = read_record(adapter)
    if record is not None:
        return str(record["config"]["backbone"]["source"])
    named = files.config.get("base_model_name_or_path")
    if not named:
        raise MergeRefused(f"{adapter} does not say which backbone it is for: give it with --backbone")
    own_names = {hub: ours for ours, hub in HUB_NAMES.items()}
    return own_names.get(str(named), str(named))


def _refuse_int8(source: str, cache_dir: Path | None) -> None:
    if is_int8_checkpoint(resolve_source(source, cache_dir)):
        raise MergeRefused(
            f"backbone {source!r} is in int8: its steps are larger than most of an adapter's update, which rounding "
            "would take away again; merge into the float weights (--backbone), and convert the result to int8"
        )


def _untie(model: PreTrainedModel, files: AdapterDirectory) -> None:
    """An update of the head alone, or of the embedding alone, must not reach the other through a shared weight."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    paths = [path for path, module in model.named_modules() if module is head or module is embedding]
    if any(f".{path}." in f".{name}" for path in paths for name in files.tensors):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _merged(model: PreTrainedModel, adapter: Path, files: AdapterDirectory) -> PreTrainedModel:
    try:
        wrapped: Any = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise MergeRefused(f"peft cannot put {adapter} on this backbone: {error}") from error
    _check_all_taken(adapter, set(files.tensors), wrapped)
    merged = wrapped.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    return merged


def _check_all_taken(adapter: Path, given: set[str], wrapped: PeftModel) -> None:
    """peft only warns of tensors that are missing, and leaves those parts of the adapter random; of tensors that it has
    no place for it says nothing."""
    expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if missing := sorted(expected - given):
        raise MergeRefused(f"{adapter} lacks {len(missing)} tensors that its configuration asks for: {missing[0]}, ...")
    # A saved embedding matrix is no part of the adapter, and taken over by the name that it has in the model.
    if left := sorted(given - expected - set(wrapped.state_dict())):
        raise MergeRefused(
            f"{adapter} holds {len(left)} tensors that have no place in this backbone and would be lost: {left[0]}, ..."
        )
