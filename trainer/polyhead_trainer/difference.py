"""`trainer difference`: what a full fine-tune changed, as a LoRA adapter of rank r for its backbone; what that loses.

For a linear layer whose weight W [out, in] became W + D, the adapter's product B A is D cut to its r largest singular
values: of all matrices of rank r the nearest to D (Eckart and Young 1936). What changed elsewhere (norms, embeddings,
biases) no LoRA of linear layers can hold: it is measured and lost.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from polyhead_core.backbone import Backbone, load_backbone
from polyhead_core.devices import check_device
from polyhead_trainer.backbones import HUB_NAMES
from polyhead_trainer.errors import DifferenceRefused
from polyhead_trainer.methods.peft_tuned import stamp
from polyhead_trainer.staging import new_directory

RECORD_FILE = "polyhead_difference.json"


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """One linear layer that changed."""

    layer: str
    change_norm: float
    """Frobenius norm of D."""
    relative_change: float | None
    """That norm by the one of W; None: W was all zero."""
    relative_error: float
    """Frobenius norm of D - B A, by the one of D: 0 is exact, 1 is nothing."""


@dataclass(frozen=True, kw_only=True)
class LostChange:
    """A changed parameter that is no linear layer's weight."""

    parameter: str
    change_norm: float
    relative_change: float | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    output: Path
    content_hash: str
    rank: int
    layers: list[LayerError]
    lost: list[LostChange]

    @property
    def relative_error(self) -> float:
        """Over all linear layers together: Frobenius norm of what the adapter lacks of D, by the one of D."""
        return _norm(one.relative_error * one.change_norm for one in self.layers) / _norm(
            one.change_norm for one in self.layers
        )

    @property
    def lost_share(self) -> float:
        """Share of the squared change of all weights that lies outside linear layers."""
        lost, kept = (_norm(one.change_norm for one in part) ** 2 for part in (self.lost, self.layers))
        return lost / (lost + kept)

    def to_json(self) -> str:
        record = {
            "rank": self.rank,
            "relative_error": self.relative_error,
            "lost_share": self.lost_share,
            "layers": [dataclasses.asdict(one) for one in self.layers],
            "lost": [dataclasses.asdict(one) for one in self.lost],
        }
        return json.dumps(record, indent=1) + "\n"


def export_difference(
    base: str, tuned: str, output: Path, *, rank: int, device: str = "cpu", cache_dir: Path | None = None
) -> Difference:
    """Writes the adapter for `base` in PEFT's format. Holds both models in float32, and works layer by layer.

    Raises DifferenceRefused, BackboneError, ConfigError, OutputExists, StorageFailed.
    """
    check_device(device, "--device")
    with new_directory(output) as staging:
        backbone, changed = (
            load_backbone(source, quantization="none", dtype="float32", cache_dir=cache_dir) for source in (base, tuned)
        )
        _check_same_parameters(backbone, changed)
        layers = _changed_layers(backbone.model, changed.model)
        if not layers:
            raise DifferenceRefused(f"no linear layer of {tuned!r} differs from {base!r}: there is nothing to export")
        lost = _lost_changes(backbone.model, changed.model)
        errors = _write(backbone, changed.model, layers, staging, rank, torch.device(device))
        content_hash = stamp(staging, fingerprint=backbone.fingerprint, quantization="none")
        difference = Difference(output=output, content_hash=content_hash, rank=rank, layers=errors, lost=lost)
        (staging / RECORD_FILE).write_text(difference.to_json(), encoding="utf-8")
    return difference


def truncated_svd(change_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors A [rank, in] and B [out, rank] of the best approximation of that rank; rows that it lacks are zero."""
    left_OK, values_K, right_KI = torch.linalg.svd(change_OI, full_matrices=False)
    kept = min(rank, len(values_K))
    root_K = values_K[:kept].sqrt()
    factor_a_RI, factor_b_OR = change_OI.new_zeros(rank, change_OI.shape[1]), change_OI.new_zeros(len(change_OI), rank)
    factor_a_RI[:kept] = root_K[:, None] * right_KI[:kept]
    factor_b_OR[:, :kept] = left_OK[:, :kept] * root_K
    return factor_a_RI, factor_b_OR


def _check_same_parameters(base: Backbone, tuned: Backbone) -> None:
    ours, theirs = ({name: p.shape for name, p in one.model.named_parameters()} for one in (base, tuned))
    unlike = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if unlike:
        shapes = " and ".join(str(list(side[unlike[0]])) if unlike[0] in side else "none" for side in (ours, theirs))
        raise DifferenceRefused(
            f"{base.source!r} and {tuned.source!r} differ in {len(unlike)} parameters' names or shapes, as in "
            f"{unlike[0]}: {shapes}; expected a model and its own full fine-tune"
        )
    for one in (base, tuned):
        for name, parameter in one.model.named_parameters():
            if not parameter.isfinite().all():
                raise DifferenceRefused(f"{one.source!r}: {name} holds values that are no finite numbers")


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Those whose weight is their own: a head tied to the embedding changes with it."""
    embedding = model.get_input_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight is not embedding.weight
    }


def _changed_layers(base: PreTrainedModel, tuned: PreTrainedModel) -> list[str]:
    after = _linear_layers(tuned)
    return [p for p, layer in _linear_layers(base).items() if not torch.equal(layer.weight, after[p].weight)]


def _lost_changes(base: PreTrainedModel, tuned: PreTrainedModel) -> list[LostChange]:
    exported = {f"{path}.weight" for path in _linear_layers(base)}
    after = dict(tuned.named_parameters())
    lost = []
    for name, parameter in base.named_parameters():
        if name not in exported and not torch.equal(parameter, after[name]):
            change = (after[name] - parameter).norm().item()
            lost.append(
                LostChange(parameter=name, change_norm=change, relative_change=_ratio(change, parameter.norm().item()))
            )
    return lost


@torch.no_grad()
def _write(
    backbone: Backbone,
    tuned: PreTrainedModel,
    layers: Sequence[str],
    directory: Path,
    rank: int,
    device: torch.device,
) -> list[LayerError]:
    models = (backbone.model, tuned)
    weights, changed = ({path: layer.weight for path, layer in _linear_layers(model).items()} for model in models)
    # alpha = rank: the product is taken as it is. Whole paths, because other layers may end in the same name.
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        target_modules=list(layers),
        base_model_name_or_path=HUB_NAMES.get(backbone.source, backbone.source),
        ensure_weight_tying=False,
    )
    wrapped = get_peft_model(backbone.model, config)
    wrapped.peft_config["default"].base_model_name_or_path = config.base_model_name_or_path
    errors = []
    for path in layers:
        module: Any = wrapped.get_submodule(f"base_model.model.{path}")
        before_OI = weights[path].to(device)
        change_OI = changed[path].to(device) - before_OI
        factor_a_RI, factor_b_OR = truncated_svd(change_OI, rank)
        module.lora_A["default"].weight.copy_(factor_a_RI)
        module.lora_B["default"].weight.copy_(factor_b_OR)
        change = change_OI.norm().item()
        errors.append(
            LayerError(
                layer=path,
                change_norm=change,
                relative_change=_ratio(change, before_OI.norm().item()),
                relative_error=(change_OI - factor_b_OR @ factor_a_RI).norm().item() / change,
            )
        )
    wrapped.save_pretrained(str(directory), save_embedding_layers=False)
    return errors


def describe(difference: Difference) -> Iterable[str]:
    """The errors as lines for people: worst layers first."""
    yield f"{difference.output} written: rank {difference.rank}, {len(difference.layers)} linear layers"
    yield f"relative error of the change, all linear layers together: {difference.relative_error:.2%}"
    for one in sorted(difference.layers, key=lambda layer: -layer.relative_error):
        yield f"  {one.relative_error:7.2%}  {one.layer} (changed {_by_its_norm(one.relative_change)})"
    yield f"outside linear layers, and lost: {difference.lost_share:.2%} of the squared change"
    for other in sorted(difference.lost, key=lambda lost: -lost.change_norm):
        yield f"  {other.parameter} (changed {_by_its_norm(other.relative_change)})"


def _norm(values: Iterable[float]) -> float:
    return math.hypot(*values)


def _ratio(change: float, norm: float) -> float | None:
    return change / norm if norm else None


def _by_its_norm(relative_change: float | None) -> str:
    return "from zero" if relative_change is None else f"by {relative_change:.2%} of its norm"
