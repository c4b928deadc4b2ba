"""LoRA and rsLoRA, as PEFT saves them: low-rank deltas at linear layers, the head and the embedding, and biases.

LoRA: Hu et al. 2021. rsLoRA: Kalajdzievski 2023. y += s B (A x), s = alpha / r, with rsLoRA alpha / sqrt(r).
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from polyhead_core.adapter_directory import AdapterDirectory
from polyhead_core.errors import AdapterFormatError, AdapterMismatch, AdapterRejected
from polyhead_core.sites import Site, SiteKind
from polyhead_server.adapters import validation as check
from polyhead_server.adapters.base import BackboneView, BiasDelta, Contribution, HostAdapter, LowRankDelta
from polyhead_server.adapters.patterns import PatternTable

_PREFIX = "base_model.model."

# What may follow a module's path in a saved key. The longer endings come first: `.lora_B.bias` ends in `.bias` too.
_A, _B, _B_BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"
_EMBED_A, _EMBED_B = ".lora_embedding_A", ".lora_embedding_B"
_WRAPPED_BIAS, _WRAPPED_WEIGHT, _BIAS, _WEIGHT = ".base_layer.bias", ".base_layer.weight", ".bias", ".weight"
_ENDINGS = (_A, _B, _B_BIAS, _EMBED_A, _EMBED_B, _WRAPPED_BIAS, _WRAPPED_WEIGHT, _BIAS, _WEIGHT)
_ENDINGS_BY_KIND = {SiteKind.LINEAR: (_A, _B), SiteKind.EMBED: (_EMBED_A, _EMBED_B)}

_DEFAULTS: dict[str, Any] = {
    field.name: field.default if field.default is not dataclasses.MISSING else None
    for field in dataclasses.fields(LoraConfig)
}
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "lora_bias", "init_lora_weights"}
_WITHOUT_EFFECT_WHEN_SERVED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying",
}  # fmt: skip
"""Every other setting, those of later PEFT versions included, is refused unless it is at its default."""
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Ways to initialise that leave the backbone's weights alone; the others subtract from them when peft loads them."""


@dataclass(frozen=True)
class _Settings:
    ranks: PatternTable[int]
    alphas: PatternTable[float]
    rank_stabilized: bool
    saves_biases: bool
    lora_bias: bool

    def scale(self, path: str) -> float:
        alpha, rank = self.alphas.resolve(path), self.ranks.resolve(path)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank


class LoraType:
    peft_type = "LORA"

    def read(self, adapter: AdapterDirectory, backbone: BackboneView, *, max_rank: int) -> HostAdapter:
        settings = _read_settings(adapter)
        check.check_dtypes(adapter)
        contributions: list[Contribution] = []
        num_parameters = 0
        for path, tensors in _by_module(adapter).items():
            for key, tensor in tensors.items():
                check.check_finite(adapter, _PREFIX + path + key, tensor)
            _drop_base_weight(adapter, backbone, path, tensors)
            num_parameters += sum(tensor.numel() for tensor in tensors.values())
            contributions += _read_module(adapter, backbone, settings, path, tensors, max_rank)
        if not any(_has_effect(contribution) for contribution in contributions):
            raise AdapterRejected(
                f"adapter {adapter.name!r} has no effect: with every A or every B zero it would answer exactly as the "
                "backbone; it was saved before it was trained",
                details={"adapter": adapter.name},
            )
        return HostAdapter(
            content_hash=adapter.content_hash,
            peft_type=self.peft_type,
            max_rank=max((c.rank for c in contributions if isinstance(c, LowRankDelta)), default=0),
            num_parameters=num_parameters,
            file_bytes=adapter.file_bytes,
            contributions=tuple(contributions),
        )


def _read_settings(adapter: AdapterDirectory) -> _Settings:
    check.check_config_keys(adapter, list(_DEFAULTS))
    config = {**_DEFAULTS, **adapter.config}
    for key in sorted(set(_DEFAULTS) - _READ - _WITHOUT_EFFECT_WHEN_SERVED):
        # An empty setting is as good as none: PEFT itself asks for truth only.
        if config[key] and config[key] != _DEFAULTS[key]:
            raise AdapterRejected(
                f"adapter {adapter.name!r}: LoRA with {key} = {ascii(config[key])[:200]} is not served yet",
                details={"adapter": adapter.name, "key": key},
            )
    _check_init(adapter, config["init_lora_weights"])
    for key in ("use_rslora", "lora_bias"):
        if not isinstance(config[key], bool):
            check.refuse_value(adapter, key, config[key], "true or false")
    if config["bias"] not in ("none", "all", "lora_only"):
        check.refuse_value(adapter, "bias", config["bias"], "none, all or lora_only")
    if not check.is_rank(config["r"]):
        check.refuse_value(adapter, "r", config["r"], "an integer of at least 1")
    if not check.is_finite_number(config["lora_alpha"]):
        check.refuse_value(adapter, "lora_alpha", config["lora_alpha"], "a number")
    for key, is_usable, expected in (
        ("rank_pattern", check.is_rank, "an object of integers of at least 1"),
        ("alpha_pattern", check.is_finite_number, "an object of numbers"),
    ):
        config[key] = {} if config[key] is None else config[key]
        if not isinstance(config[key], dict) or not all(map(is_usable, config[key].values())):
            check.refuse_value(adapter, key, config[key], expected)
    return _Settings(
        ranks=PatternTable(adapter, "rank_pattern", config["rank_pattern"], config["r"]),
        alphas=PatternTable(adapter, "alpha_pattern", config["alpha_pattern"], config["lora_alpha"]),
        rank_stabilized=config["use_rslora"],
        saves_biases=config["bias"] != "none",
        lora_bias=config["lora_bias"],
    )


def _check_init(adapter: AdapterDirectory, init: object) -> None:
    if init is None or isinstance(init, bool) or init in _PLAIN_INITS:
        return
    raise AdapterRejected(
        f"adapter {adapter.name!r}: init_lora_weights = {ascii(init)[:80]} changes the backbone's own weights; save it "
        "as plain LoRA with save_pretrained(path_initial_model_for_weight_conversion=...)",
        details={"adapter": adapter.name, "key": "init_lora_weights"},
    )


def _by_module(adapter: AdapterDirectory) -> dict[str, dict[str, Tensor]]:
    """{module path: {ending: tensor}}, in a fixed order."""
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key in sorted(adapter.tensors):
        ending = next((ending for ending in _ENDINGS if key.endswith(ending)), None)
        if ending is None or not key.startswith(_PREFIX) or len(key) <= len(_PREFIX) + len(ending):
            raise AdapterFormatError(
                f"adapter {adapter.name!r}: unknown tensor {check.shown(key)}; expected {_PREFIX}MODULE followed by "
                f"one of {', '.join(_ENDINGS)}",
                details={"adapter": adapter.name, "tensor": check.shown(key)},
            )
        modules[key[len(_PREFIX) : -len(ending)]][ending] = adapter.tensors[key]
    return modules


def _drop_base_weight(adapter: AdapterDirectory, backbone: BackboneView, path: str, tensors: dict[str, Tensor]) -> None:
    """Drops a copy of the backbone's own weight, which PEFT saves beside LoRA on an embedding or head."""
    for ending in (_WRAPPED_WEIGHT, _WEIGHT):
        weight = tensors.pop(ending, None)
        if weight is not None and not backbone.same_weight(path, weight):
            raise AdapterRejected(
                f"adapter {adapter.name!r} brings a weight {tuple(weight.shape)} of its own for {check.shown(path)}, "
                "unlike the "
                "backbone's; replaced weights are not served yet (save with save_embedding_layers=False if it was not "
                "trained)",
                details={"adapter": adapter.name, "module": check.shown(path)},
            )


def _read_module(
    adapter: AdapterDirectory,
    backbone: BackboneView,
    settings: _Settings,
    path: str,
    tensors: dict[str, Tensor],
    max_rank: int,
) -> list[Contribution]:
    site = backbone.sites.by_path.get(path)
    if site is None:
        near = check.nearest(path, backbone.sites.by_path)
        raise AdapterMismatch(
            f"adapter {adapter.name!r} is for a layer {check.shown(path)} that this backbone lacks; the nearest "
            f"is {near!r}",
            details={"adapter": adapter.name, "module": check.shown(path)},
        )
    deltas: list[Contribution] = []
    low_rank = _low_rank(adapter, backbone, settings, site, tensors, max_rank)
    if low_rank is not None:
        deltas.append(low_rank)
    bias = _bias(adapter, backbone, settings, site, tensors)
    if bias is not None:
        deltas.append(bias)
    return deltas


def _low_rank(
    adapter: AdapterDirectory,
    backbone: BackboneView,
    settings: _Settings,
    site: Site,
    tensors: dict[str, Tensor],
    max_rank: int,
) -> LowRankDelta | None:
    present = {ending for ending in (_A, _B, _B_BIAS, _EMBED_A, _EMBED_B) if ending in tensors}
    if not present:
        return None
    if site.kind not in _ENDINGS_BY_KIND:
        raise AdapterMismatch(
            f"adapter {adapter.name!r} has low-rank factors for {site.path}, which is a {site.kind.value} layer: "
            "expected a linear layer or the embedding",
            details={"adapter": adapter.name, "site": site.path},
        )
    a_ending, b_ending = _ENDINGS_BY_KIND[site.kind]
    wanted = {a_ending, b_ending} | ({_B_BIAS} if settings.lora_bias else set())
    if present != wanted:
        given = ", ".join(sorted(ending[1:] for ending in present))
        raise AdapterFormatError(
            f"adapter {adapter.name!r} has {given} for {site.path}; expected "
            f"{', '.join(sorted(ending[1:] for ending in wanted))} together; save it again",
            details={"adapter": adapter.name, "site": site.path, "given": given},
        )
    rank = settings.ranks.resolve(site.path)
    check.check_rank(adapter, site, rank, max_rank)
    a_RI, b_OR = tensors[a_ending], tensors[b_ending]
    check.check_shape(adapter, _PREFIX + site.path + a_ending, a_RI, site, (rank, site.in_features))
    check.check_shape(adapter, _PREFIX + site.path + b_ending, b_OR, site, (site.out_features, rank))
    scale = settings.scale(site.path)
    if site.kind is SiteKind.EMBED:
        scale *= backbone.embed_scale(site.path)
    scaled_b_OR = b_OR.float() * scale
    check.check_finite(adapter, f"{_PREFIX}{site.path}{b_ending} times its scale {scale:g}", scaled_b_OR)
    return LowRankDelta(site=site, rank=rank, a=a_RI, b=scaled_b_OR)


def _bias(
    adapter: AdapterDirectory, backbone: BackboneView, settings: _Settings, site: Site, tensors: dict[str, Tensor]
) -> BiasDelta | None:
    delta_O = torch.zeros(site.out_features)
    for ending in (_WRAPPED_BIAS, _BIAS):
        if ending in tensors:
            _check_biases_are_saved(adapter, settings, site.path)
            base_O = _base_bias(adapter, backbone, site.path)
            check.check_shape(adapter, _PREFIX + site.path + ending, tensors[ending], site, (site.out_features,))
            delta_O += tensors[ending].float() - base_O.float().cpu()
    if _B_BIAS in tensors:
        check.check_shape(adapter, _PREFIX + site.path + _B_BIAS, tensors[_B_BIAS], site, (site.out_features,))
        delta_O += tensors[_B_BIAS].float() * settings.scale(site.path)
    check.check_finite(adapter, f"the bias of {site.path}", delta_O)
    return BiasDelta(site=site, bias=delta_O) if bool(delta_O.any()) else None


def _base_bias(adapter: AdapterDirectory, backbone: BackboneView, path: str) -> Tensor:
    base = backbone.base_bias(path)
    if base is None:
        raise AdapterMismatch(
            f"adapter {adapter.name!r} has a bias for {check.shown(path)}, which has none in this backbone",
            details={"adapter": adapter.name, "module": check.shown(path)},
        )
    return base


def _check_biases_are_saved(adapter: AdapterDirectory, settings: _Settings, path: str) -> None:
    if not settings.saves_biases:
        raise AdapterFormatError(
            f"adapter {adapter.name!r} has a bias for {check.shown(path)} though its adapter_config.json says "
            "bias = none",
            details={"adapter": adapter.name, "module": check.shown(path)},
        )


def _has_effect(contribution: Contribution) -> bool:
    if isinstance(contribution, BiasDelta):
        return bool(contribution.bias.any())
    return bool(contribution.a.any()) and bool(contribution.b.any())
