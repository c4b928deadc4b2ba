"""LoRA adapters that cannot be served: each is told why, and what only looks wrong is taken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_making import TinyBackbone, edit_adapter, llama, make_adapter
from lora_reading import LM_HEAD, read
from lora_reading import backbone as backbone

from polyhead_core.adapter_directory import FINGERPRINT_KEY, QUANTIZATION_KEY
from polyhead_core.errors import AdapterFormatError, AdapterMismatch, AdapterRejected, AdapterTooLarge
from polyhead_server.adapters import patterns
from polyhead_server.store.packing import pack

LAYER0_Q = "base_model.model.model.layers.0.self_attn.q_proj"

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


def test_a_pattern_that_never_ends_is_refused(
    copy: Path, backbone: TinyBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "TIME_LIMIT_S", 0.1)
    edit_adapter(copy, _set(rank_pattern={r"(.|..|...)*(?=X)Y?": 4}))
    with pytest.raises(AdapterFormatError, match="too long to match"):
        read(copy, backbone)
