"""Meta's layout and transformers': bit-equal both ways, the same function, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import import_protobuf

from polyhead_core.backbone import load_backbone
from polyhead_core.backbone.checkpoint import compute_fingerprint, fingerprint
from polyhead_trainer.convert.from_meta import meta_to_hugging_face
from polyhead_trainer.convert.llama_layout import feed_forward_width
from polyhead_trainer.convert.meta_params import LLAMA3_ROPE, read_params
from polyhead_trainer.convert.run import convert
from polyhead_trainer.convert.to_meta import hugging_face_to_meta
from polyhead_trainer.errors import ConversionError, OutputExists
from tiny import save_backbone

PARAMS: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 40,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
SPLIT_BY_ROW = ("wq", "wk", "wv", "w1", "w3", "output")
SPLIT_BY_COLUMN = ("wo", "w2")


def whole_tensors(params: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h, kv = params["dim"], params["dim"] // params["n_heads"] * params["n_kv_heads"]
    ffn = feed_forward_width(h, params["multiple_of"], params["ffn_dim_multiplier"])
    shapes = {"tok_embeddings": (40, h), "norm": (h,), "output": (40, h)}
    for layer in range(params["n_layers"]):
        at = f"layers.{layer}."
        shapes |= {f"{at}attention.wq": (h, h), f"{at}attention.wk": (kv, h), f"{at}attention.wv": (kv, h)}
        shapes |= {f"{at}attention.wo": (h, h), f"{at}attention_norm": (h,), f"{at}ffn_norm": (h,)}
        shapes |= {f"{at}feed_forward.w1": (ffn, h), f"{at}feed_forward.w3": (ffn, h), f"{at}feed_forward.w2": (h, ffn)}
    return {
        f"{name}.weight": (torch.randn(shape, generator=generator) * 0.3 + (1 if len(shape) == 1 else 0)).to(dtype)
        for name, shape in shapes.items()
    }


def split(tensors: dict[str, Tensor], num_shards: int, embedding_dimension: int) -> list[dict[str, Tensor]]:
    """As fairscale's parallel layers share them."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(num_shards)]
    for name, tensor in tensors.items():
        kind = name.split(".")[-2]
        if kind == "tok_embeddings":
            parts = list(tensor.chunk(num_shards, embedding_dimension))
        elif kind in SPLIT_BY_ROW or kind in SPLIT_BY_COLUMN:
            parts = list(tensor.chunk(num_shards, int(kind in SPLIT_BY_COLUMN)))
        else:
            parts = [tensor] * num_shards
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    return shards


def save_meta(folder: Path, shards: list[dict[str, Tensor]], params: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    for number, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{number:02}.pth")
    (folder / "params.json").write_text(json.dumps(params or PARAMS))
    return folder


def meta_logits(tensors: dict[str, Tensor], ids_T: Tensor) -> Tensor:
    """Llama as its paper and Meta's layout define it: rotation of neighbours as complex numbers."""
    heads, kv_heads, width = PARAMS["n_heads"], PARAMS["n_kv_heads"], PARAMS["dim"] // PARAMS["n_heads"]
    frequencies = PARAMS["rope_theta"] ** (-torch.arange(0, width, 2).float() / width)
    angles_TD = torch.outer(torch.arange(len(ids_T)).float(), frequencies)
    rotation_T1D = torch.polar(torch.ones_like(angles_TD), angles_TD)[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + PARAMS["norm_eps"]) * tensors[f"{name}.weight"]

    def rotate(x_THD: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x_THD.reshape(*x_THD.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotation_T1D).flatten(-2)

    x = tensors["tok_embeddings.weight"][ids_T]
    for layer in range(PARAMS["n_layers"]):
        weight = {name: tensors[f"layers.{layer}.{name}.weight"] for name in (
            "attention.wq", "attention.wk", "attention.wv", "attention.wo",
            "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
        )}  # fmt: skip
        h = norm(x, f"layers.{layer}.attention_norm")
        q = rotate((h @ weight["attention.wq"].T).view(-1, heads, width))
        k = rotate((h @ weight["attention.wk"].T).view(-1, kv_heads, width)).repeat_interleave(heads // kv_heads, 1)
        v = (h @ weight["attention.wv"].T).view(-1, kv_heads, width).repeat_interleave(heads // kv_heads, 1)
        mixed = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True)
        x = x + mixed.transpose(0, 1).flatten(1) @ weight["attention.wo"].T
        h = norm(x, f"layers.{layer}.ffn_norm")
        gated = F.silu(h @ weight["feed_forward.w1"].T) * (h @ weight["feed_forward.w3"].T)
        x = x + gated @ weight["feed_forward.w2"].T
    return norm(x, "norm") @ tensors["output.weight"].T


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("embedding_dimension", [0, 1])
def test_the_converted_model_computes_what_metas_does(
    tmp_path: Path, num_shards: int, embedding_dimension: int
) -> None:
    tensors = whole_tensors(PARAMS)
    source = save_meta(tmp_path / "meta", split(tensors, num_shards, embedding_dimension))
    convert(str(source), tmp_path / "hf", "huggingface")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = torch.arange(3, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[None]).logits[0], meta_logits(tensors, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_is_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    shards = split(whole_tensors(PARAMS, dtype), 2, embedding_dimension=1)
    for shard in shards:
        shard["rope.freqs"] = torch.ones(4, dtype=dtype)
    source = save_meta(tmp_path / "meta", shards)
    hf = tmp_path / "hf"
    hf.mkdir()
    meta_to_hugging_face(source, hf, max_file_bytes=8000)
    assert len(list(hf.glob("*.safetensors"))) > 2
    convert(str(hf), tmp_path / "back", "meta", num_shards=2)
    assert sorted(file.name for file in (tmp_path / "back").iterdir()) == sorted(f.name for f in source.iterdir())
    assert (tmp_path / "back" / "params.json").read_text() == (source / "params.json").read_text()
    for number, shard in enumerate(shards):
        back = torch.load(tmp_path / "back" / f"consolidated.{number:02}.pth", weights_only=True)
        del shard["rope.freqs"]
        assert set(back) == set(shard)
        for name, tensor in shard.items():
            assert back[name].dtype == dtype
            assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_hugging_face_model_goes_there_and_back(tmp_path: Path, kind: str, num_shards: int) -> None:
    hf = save_backbone("llama", tmp_path / "hf", tie_word_embeddings=kind == "tied")
    convert(str(hf), tmp_path / "meta", "meta", num_shards=num_shards)
    convert(str(tmp_path / "meta"), tmp_path / "back", "huggingface", max_positions=512)
    before, after = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "back"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    settings = [json.loads((folder / "config.json").read_text()) for folder in (hf, tmp_path / "back")]
    for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "rms_norm_eps", "rope_parameters",
                 "tie_word_embeddings", "max_position_embeddings", "vocab_size"):  # fmt: skip
        assert settings[0][name] == settings[1][name], name
    ids = torch.arange(4, 30)[None]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (hf, tmp_path / "back")]
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_scaled_rope_survives_the_way_there_and_back(tmp_path: Path) -> None:
    params = {**PARAMS, "rope_theta": 500000.0, "use_scaled_rope": True}
    convert(str(save_meta(tmp_path / "meta", [whole_tensors(PARAMS)], params)), tmp_path / "hf", "huggingface")
    rope = json.loads((tmp_path / "hf" / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 8.0, 500000.0)
    (tmp_path / "hf" / "original" / "params.json").unlink()
    convert(str(tmp_path / "hf"), tmp_path / "back", "meta")
    made = read_params(tmp_path / "back" / "params.json")
    assert made.architecture == read_params(tmp_path / "meta" / "params.json").architecture


def sentencepiece_model(pieces: list[tuple[str, float, int]]) -> bytes:
    model = import_protobuf().ModelProto()
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    data = model.SerializeToString()
    assert isinstance(data, bytes)
    return data


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    words = ["▁", "a", "b", "ab", "▁ab"]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(word, -float(rank), 1) for rank, word in enumerate(words)]
    source = save_meta(tmp_path / "meta", [whole_tensors(PARAMS)])
    (source / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    convert(str(source), tmp_path / "hf", "huggingface")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("ab ab")["input_ids"] == [1, 7, 7]
    assert tokenizer.decode([7, 7]) == "ab ab"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    convert(str(tmp_path / "hf"), tmp_path / "back", "meta")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


class Runs:
    """What unpickling would execute."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def refused(source: Path, output: Path, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert(str(source), output, "huggingface")
    assert sorted(path.name for path in output.parent.iterdir() if path.name.startswith(".")) == []
    assert not output.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, zipped: bool) -> None:
    source = save_meta(tmp_path / "meta", [whole_tensors(PARAMS)])
    hostile = {**whole_tensors(PARAMS), "extra.weight": Runs(tmp_path / "owned")}
    if zipped:
        torch.save(hostile, source / "consolidated.00.pth")
    else:
        (source / "consolidated.00.pth").write_bytes(pickle.dumps(hostile))
    refused(source, tmp_path / "hf", "cannot read .*consolidated.00.pth as tensors")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    source = save_meta(tmp_path / "meta", [whole_tensors(PARAMS)])
    file = source / "consolidated.00.pth"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    refused(source, tmp_path / "hf", "cannot read")


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    whole = whole_tensors(PARAMS)
    cases: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
        "missing": ([{k: v for k, v in whole.items() if "layers.1.ffn_norm" not in k}], {}, "1 tensors missing .*ffn"),
        "unknown": ([{**whole, "layers.0.attention.bias": torch.ones(3)}], {}, "1 unknown .*attention.bias"),
        "head": ([{k: v for k, v in whole.items() if k != "output.weight"}], {}, "lacks output.weight"),
        "shape": ([{**whole, "layers.0.attention.wk.weight": torch.ones(32, 32)}], {}, r"wk.weight is .*\(16, 32\)"),
        "dtype": ([{**whole, "layers.0.attention.wo.weight": whole["layers.0.attention.wo.weight"].half()}], {}, "wo"),
        "integers": ([{**whole, "norm.weight": torch.ones(32, dtype=torch.int8)}], {}, "expected plain floats"),
        "no-tensor": ([{**whole, "norm.weight": 3}], {}, "is a int: expected a tensor"),
        "vocabulary": ([whole], {"vocab_size": 80}, "vocab_size = 80, output.weight has 40 rows in 1 shards"),
        "layers": ([whole], {"n_layers": 3}, "9 tensors missing"),
        "heads": ([whole], {"n_heads": 5}, "do not fit together"),
        "experts": ([whole], {"moe_args": {"num_experts": 16}}, "moe_args: Extra inputs"),
        "one-of-two": (split(whole, 2, 1)[:1], {"vocab_size": -1}, "is torch.float32"),
        "norms": ([split(whole, 2, 1)[0], {**split(whole, 2, 1)[1], "norm.weight": torch.ones(32)}], {}, "differs"),
        "shards": ([split(whole, 2, 1)[0], {"norm.weight": torch.ones(32)}], {}, "shards 0 and 1 differ in"),
    }
    for name, (shards, changes, message) in cases.items():
        refused(save_meta(tmp_path / name, shards, {**PARAMS, **changes}), tmp_path / "hf", message)


def test_a_gap_in_the_shards_and_a_missing_params_file_are_refused(tmp_path: Path) -> None:
    source = save_meta(tmp_path / "meta", split(whole_tensors(PARAMS), 2, 1))
    (source / "consolidated.01.pth").rename(source / "consolidated.02.pth")
    refused(source, tmp_path / "hf", "the shards 00, 02: expected 00 to 01")
    (source / "consolidated.02.pth").rename(source / "consolidated.01.pth")
    (source / "params.json").unlink()
    refused(source, tmp_path / "hf", "cannot read .*params.json")


def test_models_without_a_form_in_metas_layout_are_refused(tmp_path: Path) -> None:
    for kind, message in (("llama-untied", "attention_bias = True"), ("qwen2", "holds a 'qwen2' model")):
        with pytest.raises(ConversionError, match=message):
            convert(str(save_backbone(kind, tmp_path / kind)), tmp_path / "meta", "meta")
    with pytest.raises(ConversionError, match=r"4 shards do not divide key/value heads \(2\)"):
        convert(str(save_backbone("llama", tmp_path / "llama")), tmp_path / "meta", "meta", num_shards=4)
    assert not (tmp_path / "meta").exists()


def test_an_output_that_is_there_is_not_touched(tmp_path: Path) -> None:
    source = save_meta(tmp_path / "meta", [whole_tensors(PARAMS)])
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputExists, match="not touched"):
        convert(str(source), tmp_path / "hf", "huggingface")
    assert [file.name for file in (tmp_path / "hf").iterdir()] == ["thesis.tex"]


def test_every_feed_forward_width_has_settings_that_give_it(tmp_path: Path) -> None:
    for width in (1, 7, 100, 1024):
        hf = save_backbone("llama", tmp_path / f"hf{width}", intermediate_size=width)
        (tmp_path / f"meta{width}").mkdir()
        hugging_face_to_meta(hf, tmp_path / f"meta{width}")
        assert read_params(tmp_path / f"meta{width}" / "params.json").feed_forward == width


@pytest.mark.parametrize("calibrated", [True, False])
def test_any_layout_becomes_int8(tmp_path: Path, calibrated: bool) -> None:
    hf = save_backbone("llama", tmp_path / "hf")
    convert(str(hf), tmp_path / "int8", "int8", calibrate=calibrated)
    direct = load_backbone(str(hf), cache_dir=tmp_path / "cache", calibrate=calibrated)
    through = load_backbone(str(tmp_path / "int8"), cache_dir=tmp_path / "cache")
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        assert torch.equal(direct.model(ids).logits, through.model(ids).logits)
    with pytest.raises(ConversionError, match="in int8 already"):
        convert(str(tmp_path / "int8"), tmp_path / "meta", "meta")


@pytest.mark.parametrize("calibrated", [True, False])
def test_int8_keeps_the_identity_of_its_source_until_its_tensors_change(tmp_path: Path, calibrated: bool) -> None:
    hf, int8 = save_backbone("llama", tmp_path / "hf"), tmp_path / "int8"
    convert(str(hf), int8, "int8", calibrate=calibrated)
    assert fingerprint(int8, tmp_path / "cache") == compute_fingerprint(hf) != compute_fingerprint(int8)
    (file,) = int8.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert fingerprint(int8, tmp_path / "cache") == compute_fingerprint(int8) != compute_fingerprint(hf)


def test_metas_layout_becomes_int8(tmp_path: Path) -> None:
    convert(
        str(save_meta(tmp_path / "meta", split(whole_tensors(PARAMS), 2, 1))), tmp_path / "i8", "int8", calibrate=False
    )
    tensors = load_file(tmp_path / "i8" / "model.safetensors")
    assert tensors["model.layers.1.mlp.down_proj.weight"].dtype == torch.int8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i8", "meta"]


def scaled_llama(folder: Path, factor: float, **changes: Any) -> Path:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, **LLAMA3_ROPE}
    return save_backbone("llama", folder, rope_parameters=rope, **changes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("factor", [8.0, 16.0, 32.0])
def test_what_params_json_does_not_say_is_said_by_a_remark(tmp_path: Path, tied: bool, factor: float) -> None:
    hf = scaled_llama(tmp_path / "hf", factor, tie_word_embeddings=tied, max_position_embeddings=131_072)
    remarks = convert(str(hf), tmp_path / "meta", "meta")
    needed = [line for line in remarks if f"--rope-factor {factor}" in line]
    assert len(needed) == (factor != (32.0 if tied else 8.0))
    assert not [line for line in remarks if "--max-positions" in line]
    back = convert(str(tmp_path / "meta"), tmp_path / "back", "huggingface", rope_factor=factor if needed else None)
    assert any(f"rope factor = {factor}" in line for line in back)
    settings = [json.loads((folder / "config.json").read_text()) for folder in (hf, tmp_path / "back")]
    assert settings[0]["rope_parameters"] == settings[1]["rope_parameters"]


def test_the_remark_knows_a_head_that_only_equals_the_embedding_and_a_kept_params_file(tmp_path: Path) -> None:
    """The way back calls such a head tied, whatever config.json says, and guesses by that."""
    hf = scaled_llama(tmp_path / "hf", 8.0, tie_word_embeddings=False, max_position_embeddings=16_384)
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    remarks = convert(str(hf), tmp_path / "meta", "meta")
    assert any("--rope-factor 8.0 --max-positions 16384" in line for line in remarks)
    options = {"rope_factor": 8.0, "max_positions": 16_384}
    convert(str(tmp_path / "meta"), tmp_path / "back", "huggingface", **options)
    assert (tmp_path / "back" / "original" / "params.json").is_file()
    again = convert(str(tmp_path / "back"), tmp_path / "again", "meta")
    assert any("--rope-factor 8.0 --max-positions 16384" in line for line in again)


@pytest.mark.parametrize("kept_params_file", [False, True])
def test_token_ids_that_metas_layout_cannot_keep_are_named(tmp_path: Path, kept_params_file: bool) -> None:
    hf = save_backbone("llama", tmp_path / "hf", bos_token_id=5, eos_token_id=[6, 7])
    if kept_params_file:
        convert(str(hf), tmp_path / "first", "meta")
        (hf / "original").mkdir()
        (tmp_path / "first" / "params.json").rename(hf / "original" / "params.json")
    remarks = convert(str(hf), tmp_path / "meta", "meta")
    (told,) = [line for line in remarks if "place for token ids" in line]
    assert "bos_token_id = 5 (then 1), eos_token_id = [6, 7] (then 2), pad_token_id = 0 (then None)" in told
    convert(str(tmp_path / "meta"), tmp_path / "back", "huggingface")
    for file in ("config.json", "generation_config.json"):
        back = json.loads((tmp_path / "back" / file).read_text())
        assert (back["bos_token_id"], back["eos_token_id"], back.get("pad_token_id")) == (1, 2, None)
    again = convert(str(tmp_path / "back"), tmp_path / "again", "meta")
    assert not [line for line in again if "place for token ids" in line], "what comes back by itself is kept"


def test_a_calibration_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    meta = save_meta(tmp_path / "meta", split(whole_tensors(PARAMS), 2, 1))
    with pytest.raises(ConversionError, match=r"meta has no tokenizer, .* or give --no-calibrate"):
        convert(str(meta), tmp_path / "i8", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta"]
