"""Backbone directories that are damaged or do not fit together: each is one clear error, never another model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyhead_core.backbone import load_backbone
from polyhead_core.errors import BackboneError
from tiny import save_backbone

CONFIG, INDEX = "config.json", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone("llama", tmp_path_factory.mktemp("good") / "backbone")


@pytest.fixture
def directory(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "backbone"))


def change_config(**changes: Any) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps({**config, **changes}))

    return change


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write(CONFIG, "{"), "config.json"),
        (write(CONFIG, "[]"), "JSON list"),
        (write(INDEX, "[]"), "JSON list"),
        (write(INDEX, "{"), INDEX),
        (write(INDEX, '{"weight_map": []}'), "weight_map"),
        (write(INDEX, '{"weight_map": {"a": 1}}'), "weight_map"),
        (write("generation_config.json", "{"), "generation_config.json"),
        (change_config(hidden_size="wide"), "hidden_size"),
        (change_config(quantization_config="int8"), "quantization_config"),
        (change_config(model_type="t5"), r"not a decoder-only language model: .*T5Config.*AutoModelForCausalLM\.$"),
    ],
)
def test_damaged_settings_are_named(
    damage: Callable[[Path], object], message: str, directory: Path, tmp_path: Path
) -> None:
    damage(directory)
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(directory), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("quantization", ["int8", "none"])
@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2}, {"attention_bias": False}])
def test_weights_that_the_configuration_has_no_place_for_are_refused(
    changes: dict[str, Any], quantization: str, tmp_path: Path
) -> None:
    """Left out without a word they would make another model of it."""
    directory = save_backbone("llama-untied", tmp_path / "backbone")
    change_config(**changes)(directory)
    with pytest.raises(BackboneError, match="does not have"):
        load_backbone(str(directory), quantization=quantization, cache_dir=tmp_path / "cache")


def test_what_an_architecture_leaves_out_by_design_is_left_out(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    change_config(num_hidden_layers=2)(directory)
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2.*"])
    for quantization in ("int8", "none"):
        backbone = load_backbone(str(directory), quantization=quantization, cache_dir=tmp_path / "cache")
        assert backbone.model.config.num_hidden_layers == 2


@pytest.mark.parametrize("size", [4, 8, 20, 23, 24, 40])
def test_a_gguf_file_that_ends_in_its_header_is_refused(size: int, tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes((b"GGUF\x03\x00\x00\x00" + b"\x05\x00\x00\x00\x00\x00\x00\x00" * 8)[:size])
    with pytest.raises(BackboneError, match="as GGUF"):
        load_backbone(str(gguf), cache_dir=tmp_path / "cache")
