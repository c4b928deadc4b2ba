"""LoRA adapters that peft saved: the pool's tables answer, and patterns resolve, as in peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_making import TinyBackbone, edit_adapter, gemma2, gpt_neox, llama, logits, make_adapter, served_by_tables
from lora_reading import LM_HEAD, read
from lora_reading import backbone as backbone
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

from polyhead_core.adapter_directory import AdapterDirectory
from polyhead_core.errors import AdapterRejected
from polyhead_core.int8 import Int8Linear
from polyhead_core.kernels.tables import RANKS_PER_PAGE, UNIT, AdapterTables
from polyhead_core.sites import Site
from polyhead_server.adapters.base import HostAdapter, LowRankDelta
from polyhead_server.adapters.patterns import PatternTable
from polyhead_server.store.packing import pack
from polyhead_server.store.page_allocator import PageAllocator
from polyhead_server.store.pool import AdapterPool

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def loaded(adapter: HostAdapter, backbone: TinyBackbone, slot: int = 1) -> AdapterPool:
    """A pool whose slot 1 holds the adapter, at units that are not the arena's first."""
    pool = AdapterPool(
        backbone.sites, num_units=1 << 14, num_slots=2, max_rank=64, dtype=torch.float32, device=torch.device("cpu")
    )
    pool.tables.arena.fill_(7.0)  # a page that is read beyond its end must show
    packed = pack(adapter, torch.float32)
    allocator = PageAllocator(1 << 14)
    allocator.allocate([8] * 100)
    starts = allocator.allocate(packed.sizes)
    assert starts is not None
    pool.set_row(slot, pool.write(packed, starts))
    return pool


VARIANTS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "attention": (llama, {"target_modules": ATTENTION}),
    "all linear": (llama, {"target_modules": "all-linear", "r": 8}),
    "rank 1": (llama, {"r": 1}),
    "rank 64": (llama, {"r": 64}),
    "rank 13 alpha 3.5": (llama, {"r": 13, "lora_alpha": 3.5}),
    "rsLoRA": (llama, {"r": 12, "use_rslora": True}),
    "rank pattern": (llama, {"r": 2, "rank_pattern": {"q_proj": 17, "layers.1.self_attn.v_proj": 9, "v_proj": 33}}),
    "alpha pattern": (llama, {"alpha_pattern": {"layers.0.self_attn.q_proj": 64, "v_proj": 1}}),
    "patterns by regex, rsLoRA": (
        llama,
        {
            "use_rslora": True,
            "rank_pattern": {r".*layers\.(1|3)\.self_attn\..*": 24, "^model.layers.0.self_attn.q_proj": 5},
            "alpha_pattern": {r"layers\.\d+\.self_attn\.q_proj": 5, "q_proj": 100},
        },
    ),
    "one layer": (llama, {"layers_to_transform": [1]}),
    "head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "head, tied": (lambda: llama(tied=True), {"target_modules": ["lm_head"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens"], "r": 11}),
    "embedding without its base": (llama, {"target_modules": ["embed_tokens"], "save_embedding_layers": False}),
    "embedding, tied": (lambda: llama(tied=True), {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head, tied": (lambda: llama(tied=True), {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding and head, tied adapters": (
        lambda: llama(tied=True),
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "embedding rsLoRA pattern": (
        llama,
        {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True, "rank_pattern": {"embed_tokens": 20}},
    ),
    "scaled embedding": (gemma2, {"target_modules": ["embed_tokens", "o_proj"]}),
    "biases of targets": (lambda: llama(bias=True), {"bias": "lora_only"}),
    "all biases": (lambda: llama(bias=True), {"bias": "all"}),
    "LoRA bias": (lambda: llama(bias=True), {"lora_bias": True, "target_modules": ["q_proj", "up_proj"]}),
    "LoRA bias on top of all biases": (lambda: llama(bias=True), {"lora_bias": True, "bias": "all"}),
    "GPT-NeoX biases": (gpt_neox, {"bias": "lora_only", "target_modules": ["query_key_value", "dense"]}),
    "GPT-NeoX, norms' biases too": (gpt_neox, {"bias": "all", "target_modules": ["query_key_value"]}),
    "saved in bfloat16": (lambda: llama().to(torch.bfloat16).float(), {"autocast_adapter_dtype": False}),
    "gaussian": (llama, {"init_lora_weights": "gaussian"}),
    "MiCA": (llama, {"init_lora_weights": "mica"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tables_answer_as_peft_does(variant: str, tmp_path: Path) -> None:
    make_model, settings = VARIANTS[variant]
    settings = {key: value for key, value in settings.items() if key != "autocast_adapter_dtype"}
    backbone = TinyBackbone(make_model())
    wrapped = make_adapter(tmp_path / "a", make_model(), **settings)
    if variant == "saved in bfloat16":
        wrapped = wrapped.to(torch.bfloat16)
        wrapped.save_pretrained(tmp_path / "a")
        wrapped = wrapped.float()
    adapter = read(tmp_path / "a", backbone)
    tables = loaded(adapter, backbone).tables
    expected, plain = logits(wrapped), logits(backbone.model)
    with served_by_tables(backbone, tables, slot=1):
        torch.testing.assert_close(logits(backbone.model), expected, atol=2e-5, rtol=1e-4)
    with served_by_tables(backbone, tables, slot=0):
        assert torch.equal(logits(backbone.model), plain), "an empty slot changes nothing"
    assert (expected - plain).abs().max() > 0.01
    _check_deltas(wrapped, backbone, tables, adapter)


def _check_deltas(wrapped: Any, backbone: TinyBackbone, tables: AdapterTables, adapter: HostAdapter) -> None:
    ranks = {c.site.path: c.rank for c in adapter.contributions if isinstance(c, LowRankDelta)}
    for site in backbone.sites:
        assert int(tables.num_pages[1, site.index]) == -(-ranks.get(site.path, 0) // RANKS_PER_PAGE)
    assert adapter.max_rank == max(ranks.values())
    for path in ranks:
        module = wrapped.base_model.model.get_submodule(path)
        delta = module.get_delta_weight("default")
        site = backbone.sites.by_path[path]
        if path.endswith("embed_tokens"):
            delta = delta.T * float(getattr(module.get_base_layer(), "embed_scale", 1.0))
        torch.testing.assert_close(_delta(tables, site), delta, atol=1e-5, rtol=1e-4)


def _delta(tables: AdapterTables, site: Site) -> torch.Tensor:
    """[out, in], page by page."""
    total = torch.zeros(site.out_features, site.in_features)
    for page in range(int(tables.num_pages[1, site.index])):
        a_start, b_start = (tables.pages[1, site.index, page] * UNIT).tolist()
        a = tables.arena[a_start : a_start + RANKS_PER_PAGE * site.in_features]
        b = tables.arena[b_start : b_start + RANKS_PER_PAGE * site.out_features].view(RANKS_PER_PAGE, -1)
        is_embedding = site.kind.value == "embed"
        total += b.T @ (a.view(-1, RANKS_PER_PAGE).T if is_embedding else a.view(RANKS_PER_PAGE, -1))
    return total


def test_counts_only_the_adapters_own_parameters(tmp_path: Path) -> None:
    backbone = TinyBackbone(llama())
    make_adapter(tmp_path / "a", llama(), target_modules=["embed_tokens"], r=4)
    adapter = read(tmp_path / "a", backbone)
    assert adapter.num_parameters == 4 * (128 + 64)
    assert adapter.num_bytes == 4 * adapter.num_parameters
    assert adapter.file_bytes > 4 * 128 * 64, "the copy of the embedding is on disk, and only there"


@pytest.mark.parametrize("is_served", [False, True])
def test_saved_head_of_an_int8_backbone_is_recognised(tmp_path: Path, is_served: bool) -> None:
    make_adapter(tmp_path / "a", llama(), target_modules=["lm_head"])
    model = llama()
    model.lm_head = Int8Linear.from_weight(model.lm_head.weight.detach(), input_scale_I=torch.rand(64) + 0.5)
    if is_served:
        model.lm_head.prepack()
    backbone = TinyBackbone(model, quantization="int8")
    assert len(read(tmp_path / "a", backbone).contributions) == 1
    edit_adapter(tmp_path / "a", lambda _, tensors, __: tensors[f"{LM_HEAD}.base_layer.weight"].add_(0.05))
    with pytest.raises(AdapterRejected, match="weight"):
        read(tmp_path / "a", backbone)


def test_a_copy_of_a_released_weight_is_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", llama(), target_modules=["q_proj"])
    model = llama()
    path = "model.layers.0.self_attn.q_proj"
    layer = Int8Linear.from_weight(model.get_submodule(path).weight.detach())
    model.set_submodule(path, layer)
    edit_adapter(
        tmp_path / "a",
        lambda _, tensors, __: tensors.update({f"base_model.model.{path}.base_layer.weight": layer.dequantize()}),
    )
    backbone = TinyBackbone(model, quantization="int8")
    assert read(tmp_path / "a", backbone).contributions
    layer.release_weight()
    with pytest.raises(AdapterRejected, match="weight"):
        read(tmp_path / "a", backbone)


PATTERNS = [
    {"q_proj": 1, "self_attn.q_proj": 2},
    {"self_attn.q_proj": 2, "q_proj": 1},
    {"^model.layers.0.self_attn.q_proj": 3},
    {"layers.0": 4},
    {r".*\.0\..*": 5},
    {r"(k|v)_proj": 6, r"model\.layers\.[1-3]\..*": 7},
    {"proj": 8, "_proj": 9, ".*proj": 10},
    {"lm_head": 11},
    {"": 12, "head": 13},
    {"model.layers.1.mlp.up_proj": 14, "up_proj$": 15},
]


@pytest.mark.parametrize("table", PATTERNS)
def test_patterns_resolve_as_in_peft(table: dict[str, int], backbone: TinyBackbone) -> None:
    adapter = AdapterDirectory(name="a", config={}, tensors={}, metadata={}, content_hash="", file_bytes=0)
    ours = PatternTable(adapter, "rank_pattern", table, 0)
    for path in [site.path for site in backbone.sites]:
        assert ours.resolve(path) == table.get(get_pattern_key(table.keys(), path), 0), path
