"""LoRA adapters that peft saved: the pool's tables answer as peft does, and what cannot be served says why."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_making import TinyBackbone, edit_adapter, gemma2, gpt_neox, llama, logits, make_adapter, served_by_tables
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

from polyhead_core.adapter_directory import FINGERPRINT_KEY, QUANTIZATION_KEY, AdapterDirectory
from polyhead_core.errors import AdapterFormatError, AdapterMismatch, AdapterRejected, AdapterTooLarge
from polyhead_core.int8 import Int8Linear
from polyhead_core.kernels.tables import RANKS_PER_PAGE, UNIT, AdapterTables
from polyhead_core.sites import Site
from polyhead_server.adapters import patterns
from polyhead_server.adapters.base import HostAdapter, LowRankDelta
from polyhead_server.adapters.patterns import PatternTable
from polyhead_server.adapters.registry import read_adapter
from polyhead_server.store.backbone_view import view_backbone
from polyhead_server.store.packing import pack
from polyhead_server.store.page_allocator import PageAllocator
from polyhead_server.store.pool import AdapterPool

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LAYER0_Q = "base_model.model.model.layers.0.self_attn.q_proj"


def read(directory: Path, backbone: TinyBackbone, *, max_rank: int = 64) -> HostAdapter:
    return read_adapter(directory, view_backbone(backbone), max_rank=max_rank, max_file_bytes=1 << 30)


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


LM_HEAD = "base_model.model.lm_head"

Edit = Callable[[dict[str, Any], dict[str, torch.Tensor], dict[str, str]], object]


def _set(**changes: Any) -> Edit:
    return lambda config, tensors, metadata: config.update(changes)


def _tensor(key: str, tensor: torch.Tensor) -> Edit:
    return lambda config, tensors, metadata: tensors.update({key: tensor})


def _fill(part: str, value: float) -> Edit:
    def edit(_: object, tensors: dict[str, torch.Tensor], __: object) -> None:
        for key in tensors:
            if part in key:
                tensors[key].fill_(value)

    return edit


def _one_number(key: str, value: float) -> Edit:
    def edit(_: object, tensors: dict[str, torch.Tensor], __: object) -> None:
        tensors[key].view(-1)[3] = value

    return edit


def _rename(old: str, new: str) -> Edit:
    def edit(_: object, tensors: dict[str, torch.Tensor], __: object) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return edit


def _drop_everything(config: object, tensors: dict[str, torch.Tensor], metadata: object) -> None:
    tensors.clear()
    tensors["base_model.model.lm_head.weight"] = llama().lm_head.weight.detach()


A, B = f"{LAYER0_Q}.lora_A.weight", f"{LAYER0_Q}.lora_B.weight"

HOSTILE: dict[str, tuple[Edit, type[AdapterRejected], str]] = {
    "unknown type": (_set(peft_type="BONE"), AdapterRejected, "'BONE'.*served are LORA"),
    "no type": (lambda config, *_: config.pop("peft_type"), AdapterFormatError, "peft_type"),
    "type a list": (_set(peft_type=["LORA"]), AdapterFormatError, "peft_type"),
    "unknown key": (_set(use_rslor=True), AdapterFormatError, "unknown key 'use_rslor'.*'use_rslora'"),
    "unknown key, unprintable": (_set(**{"\ud800\n": 1}), AdapterFormatError, "unknown key"),
    "DoRA": (_set(use_dora=True), AdapterRejected, "use_dora.*not served yet"),
    "modules_to_save": (_set(modules_to_save=["norm"]), AdapterRejected, "modules_to_save.*not served yet"),
    "trainable tokens": (_set(trainable_token_indices=[1]), AdapterRejected, "trainable_token_indices"),
    "layer replication": (_set(layer_replication=[[0, 1]]), AdapterRejected, "layer_replication"),
    "target parameters": (_set(target_parameters=["experts.up"]), AdapterRejected, "target_parameters"),
    "activated LoRA": (_set(alora_invocation_tokens=[1, 2]), AdapterRejected, "alora_invocation_tokens"),
    "megatron": (_set(megatron_config={"a": 1}), AdapterRejected, "megatron_config"),
    "fan_in_fan_out": (_set(fan_in_fan_out=True), AdapterRejected, "fan_in_fan_out"),
    "QALoRA": (_set(use_qalora=True), AdapterRejected, "use_qalora"),
    "PiSSA": (_set(init_lora_weights="pissa"), AdapterRejected, "path_initial_model_for_weight_conversion"),
    "init a list": (_set(init_lora_weights=[1]), AdapterRejected, "init_lora_weights"),
    "rank 0": (_set(r=0), AdapterFormatError, "r = 0"),
    "rank a text": (_set(r="4"), AdapterFormatError, "r = '4'"),
    "rank true": (_set(r=True), AdapterFormatError, "r = True"),
    "alpha a text": (_set(lora_alpha="x"), AdapterFormatError, "lora_alpha"),
    "alpha beyond floats": (_set(lora_alpha=10**400), AdapterFormatError, "lora_alpha"),
    "alpha overflows": (_set(lora_alpha=1e41), AdapterFormatError, "NaN or infinity"),
    "bias unknown": (_set(bias="some"), AdapterFormatError, "none, all or lora_only"),
    "rslora a number": (_set(use_rslora=1), AdapterFormatError, "true or false"),
    "rank pattern a list": (_set(rank_pattern=[1]), AdapterFormatError, "rank_pattern"),
    "rank pattern of texts": (_set(rank_pattern={"q_proj": "4"}), AdapterFormatError, "rank_pattern"),
    "pattern not a regex": (_set(alpha_pattern={"(": 4}), AdapterFormatError, "regular expression"),
    "pattern too long": (_set(alpha_pattern={"a" * 1000: 4}), AdapterFormatError, "at most 512"),
    "too many patterns": (_set(rank_pattern={f"m{i}": 1 for i in range(5000)}), AdapterFormatError, "at most 4096"),
    "rank unlike the config's": (_set(r=8), AdapterMismatch, r"q_proj.*\(4, 64\).*\(8, 64\)"),
    "rank too large": (_set(r=65), AdapterTooLarge, "rank 65.*up to 64"),
    "rank absurd": (_set(r=10**30), AdapterTooLarge, "max_adapter_rank"),
    "wrong input width": (_tensor(A, torch.ones(4, 63)), AdapterMismatch, r"self_attn.q_proj.*\(4, 64\)"),
    "wrong output width": (_tensor(B, torch.ones(32, 4)), AdapterMismatch, r"\(32, 4\).*\(64, 4\)"),
    "three dimensions": (_tensor(A, torch.ones(4, 64, 1)), AdapterMismatch, r"\(4, 64, 1\)"),
    "empty tensor": (_tensor(A, torch.ones(0, 64)), AdapterMismatch, r"\(0, 64\)"),
    "A without B": (lambda c, tensors, m: tensors.pop(B), AdapterFormatError, "lora_A.weight for .*together"),
    "B without A": (lambda c, tensors, m: tensors.pop(A), AdapterFormatError, "lora_B.weight for .*together"),
    "embedding parts on a linear layer": (
        _rename("q_proj.lora_A.weight", "q_proj.lora_embedding_A"),
        AdapterFormatError,
        "lora_embedding_A",
    ),
    "unknown tensor": (_tensor(f"{LAYER0_Q}.lora_C.weight2", torch.ones(1)), AdapterFormatError, "unknown tensor"),
    "tensor without the prefix": (_tensor("q_proj.lora_A.weight", torch.ones(1)), AdapterFormatError, "unknown tensor"),
    "tensor without a module": (
        _tensor("base_model.model.lora_A.weight", torch.ones(1)),
        AdapterFormatError,
        "unknown",
    ),
    "DoRA's tensor": (
        _tensor(f"{LAYER0_Q}.lora_magnitude_vector", torch.ones(64)),
        AdapterFormatError,
        "unknown tensor",
    ),
    "layer of a deeper model": (_rename("layers.1.", "layers.7."), AdapterMismatch, r"layers.7.*nearest.*layers"),
    "layer with a strange name": (_rename("layers.1.", "l\n\x1b" + "x" * 999), AdapterMismatch, "lacks"),
    "NaN": (_one_number(A, float("nan")), AdapterFormatError, "q_proj.lora_A.weight.*NaN"),
    "infinity": (_one_number(B, float("-inf")), AdapterFormatError, "q_proj.lora_B.weight.*NaN or infinity"),
    "integers": (_tensor(A, torch.ones(4, 64, dtype=torch.int32)), AdapterFormatError, "torch.int32"),
    "bytes": (_tensor(A, torch.ones(4, 64, dtype=torch.uint8)), AdapterFormatError, "torch.uint8"),
    "float8": (_tensor(A, torch.ones(4, 64).to(torch.float8_e4m3fn)), AdapterFormatError, "float8"),
    "complex": (_tensor(A, torch.ones(4, 64, dtype=torch.complex64)), AdapterFormatError, "complex64"),
    "beyond float32": (_tensor(A, torch.full((4, 64), 1e300, dtype=torch.float64)), AdapterFormatError, "float32"),
    "every B zero": (_fill("lora_B", 0.0), AdapterRejected, "no effect"),
    "every A zero": (_fill("lora_A", 0.0), AdapterRejected, "no effect"),
    "alpha zero": (_set(lora_alpha=0), AdapterRejected, "no effect"),
    "nothing but the backbone's weight": (_drop_everything, AdapterRejected, "no effect"),
    "no tensors": (lambda config, tensors, metadata: tensors.clear(), AdapterFormatError, "no tensors"),
    "a bias that the config denies": (
        _tensor(f"{LAYER0_Q}.base_layer.bias", torch.ones(64)),
        AdapterFormatError,
        "none",
    ),
    "a bias where there is none": (
        lambda config, tensors, metadata: (
            config.update(bias="all"),
            tensors.update({f"{LAYER0_Q}.base_layer.bias": torch.ones(64)}),
        ),
        AdapterMismatch,
        "which has none",
    ),
    "a bias of nothing": (
        lambda config, tensors, metadata: (
            config.update(bias="all"),
            tensors.update({"base_model.model.model.norm.bias": torch.ones(0)}),
        ),
        AdapterMismatch,
        "model.norm.*(lacks|has none)",
    ),
    "low-rank factors of a norm": (_rename("self_attn.v_proj", "input_layernorm"), AdapterMismatch, "input_layernorm"),
    "LoRA bias missing": (_set(lora_bias=True), AdapterFormatError, "lora_B.bias"),
    "LoRA bias denied": (_tensor(f"{LAYER0_Q}.lora_B.bias", torch.ones(64)), AdapterFormatError, "lora_B.bias"),
    "a head of its own": (_tensor(f"{LM_HEAD}.weight", torch.ones(128, 64)), AdapterRejected, "save_embedding_layers"),
    "a resized head": (_tensor(f"{LM_HEAD}.weight", torch.ones(130, 64)), AdapterRejected, r"\(130, 64\)"),
    "a weight of nowhere": (_tensor("base_model.model.x.weight", torch.ones(1)), AdapterRejected, "unlike"),
    "wrong backbone": (
        lambda config, tensors, metadata: metadata.update({FINGERPRINT_KEY: "elsewhere"}),
        AdapterMismatch,
        "elsewhere.*tiny",
    ),
}


@pytest.fixture(scope="module")
def backbone() -> TinyBackbone:
    return TinyBackbone(llama())


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good") / "anna"
    make_adapter(directory, llama())
    return directory


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    directory = tmp_path / good.name
    directory.mkdir()
    for path in good.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_adapters_are_refused_with_their_reason(case: str, copy: Path, backbone: TinyBackbone) -> None:
    edit, error, message = HOSTILE[case]
    edit_adapter(copy, edit)
    with pytest.raises(AdapterRejected) as caught:
        pack(read(copy, backbone), torch.float32)
    assert type(caught.value) is error, caught.value
    assert re.search(message, caught.value.message, re.DOTALL), caught.value.message
    assert len(caught.value.message) < 2000
    for text in (caught.value.message, *caught.value.details.values()):
        assert "\n" not in text
        text.encode("utf-8")


def test_what_was_made_on_this_backbone_is_taken(copy: Path, backbone: TinyBackbone) -> None:
    stamps = {FINGERPRINT_KEY: "tiny", QUANTIZATION_KEY: "int8"}
    edit_adapter(copy, lambda config, tensors, metadata: metadata.update(stamps))
    assert read(copy, backbone).peft_type == "LORA"


def test_settings_that_only_training_reads_are_taken(copy: Path, backbone: TinyBackbone) -> None:
    edit_adapter(copy, _set(use_something_of_a_later_peft=False, its_config=None))
    edit_adapter(copy, _set(lora_dropout=0.5, eva_config={"rho": 2.0}, loftq_config={}, megatron_core="other.core"))
    assert len(read(copy, backbone).contributions) == 4


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


def test_a_pattern_that_never_ends_is_refused(
    copy: Path, backbone: TinyBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "TIME_LIMIT_S", 0.1)
    edit_adapter(copy, _set(rank_pattern={r"(.|..|...)*(?=X)Y?": 4}))
    with pytest.raises(AdapterFormatError, match="too long to match"):
        read(copy, backbone)
