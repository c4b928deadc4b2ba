"""GGUF into a Hugging Face directory and on: the same function, and what the directory could not say is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from polyhead_core.errors import BackboneError
from polyhead_trainer.convert.llama_layout import rotary_pairs
from polyhead_trainer.convert.meta_params import LLAMA3_ROPE
from polyhead_trainer.convert.run import Target, convert
from polyhead_trainer.errors import ConversionError
from tiny import reference_model, save_backbone, tokenizer


def save_gguf(
    file: Path,
    model: LlamaForCausalLM,
    keys: dict[str, str | float | bool] | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """As llama.cpp's converter writes Llama: rotary rows as neighbours, float32, a byte-level vocabulary."""
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer().get_vocab(), key=lambda token: tokenizer().get_vocab()[token])
    writer.add_tokenizer_model("gpt2")
    # Two merges: transformers 5.17 reads an array of one as what it holds.
    merged = ["ab", "abc"]
    extra = [f"<extra{n}>" for n in range(config.vocab_size - len(tokens) - len(merged))]
    writer.add_token_list([*tokens, *merged, *extra])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (keys or {}).items():
        {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool}[type(value)](key, value)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        stored = rotary_pairs(tensor, heads) if heads else tensor
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_a_hugging_face_directory(tmp_path: Path) -> None:
    model = reference_model(save_backbone("llama-untied", tmp_path / "m", attention_bias=False, mlp_bias=False))
    save_gguf(tmp_path / "model.gguf", model)
    convert(str(tmp_path / "model.gguf"), tmp_path / "hf", "huggingface")
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(reference_model(tmp_path / "hf")(ids).logits, model(ids).logits)
    with pytest.raises(ConversionError, match="nothing to convert"):
        convert(str(tmp_path / "hf"), tmp_path / "again", "huggingface")


def llama3_divisors(theta: float, width: int, factor: float, original: float = 8192.0) -> Tensor:
    """What llama.cpp's converter writes as rope_freqs.weight, frequency by frequency."""
    divisors = []
    for index in range(width // 2):
        wavelength = 2 * math.pi * theta ** (2 * index / width)
        if wavelength < original / 4.0:
            divisors.append(1.0)
        elif wavelength > original / 1.0:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(divisors)


def plain_llama(folder: Path, **changes: Any) -> LlamaForCausalLM:
    return reference_model(save_backbone("llama-untied", folder, attention_bias=False, mlp_bias=False, **changes))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaled_rope_comes_along_from_gguf(tmp_path: Path, factor: float) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, **LLAMA3_ROPE}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 128, "head_dim": 64}
    model = plain_llama(tmp_path / "m", rope_parameters=rope, **heads)
    divisors = llama3_divisors(500000.0, 64, factor)
    assert len({round(float(one), 4) for one in divisors}) > 3, "no frequency is between the two ends"
    save_gguf(tmp_path / "model.gguf", model, tensors={"rope_freqs.weight": divisors})
    convert(str(tmp_path / "model.gguf"), tmp_path / "hf", "huggingface")
    found = json.loads((tmp_path / "hf" / "config.json").read_text())["rope_parameters"]
    assert {name: found[name] for name in rope} == rope
    ids = torch.arange(4, 284)[None]
    with torch.no_grad():
        assert torch.equal(reference_model(tmp_path / "hf")(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, {}, r"rope\.scaling\.factor = 4\.0"),
        ({"llama.rope.scaling.type": "yarn"}, {}, r"rope\.scaling\.type = yarn"),
        ({"llama.rope.scale_linear": 2.0}, {}, r"rope\.scale_linear = 2\.0"),
        ({}, {"rope_freqs.weight": torch.tensor([1.0, 2.0] * 4)}, r"rope_freqs\.weight, whose divisors"),
        ({}, {"rope_freqs.weight": llama3_divisors(10000.0, 16, 8.0, 4096.0)}, r"rope_freqs\.weight, whose divisors"),
        ({}, {"rope_freqs.weight": torch.tensor([1.0, 2.0])}, r"rope_freqs\.weight, whose divisors"),
        ({}, {"rope_factors_long.weight": torch.ones(8)}, r"1 tensors .*rope_factors_long\.weight"),
        ({}, {"blk.1.attn_q.bias": torch.ones(64)}, r"1 tensors that LlamaForCausalLM does not have.*attn_q\.bias"),
        ({}, {"blk.3.nextn.eh_proj.weight": torch.ones(64, 128)}, r"1 tensors that LlamaForCausalLM does not have"),
    ],
)  # fmt: skip
def test_what_a_gguf_file_says_and_the_directory_would_not_is_refused(
    tmp_path: Path, keys: dict[str, str | float | bool], tensors: dict[str, Tensor], message: str
) -> None:
    save_gguf(tmp_path / "model.gguf", plain_llama(tmp_path / "m"), keys, tensors)
    with pytest.raises(BackboneError, match=f"{message}.*Hugging Face directory"):
        convert(str(tmp_path / "model.gguf"), tmp_path / "hf", "huggingface")
    assert not (tmp_path / "hf").exists()


def test_settings_and_tensors_of_gguf_without_effect_are_not_refused(tmp_path: Path) -> None:
    keys: dict[str, str | float | bool] = {
        "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0, "llama.rope.scaling.finetuned": False,
    }  # fmt: skip
    tensors = {"rope_freqs.weight": torch.ones(8), "blk.0.attn_rot_embd.weight": torch.ones(8)}
    model = plain_llama(tmp_path / "m")
    save_gguf(tmp_path / "model.gguf", model, keys, tensors)
    convert(str(tmp_path / "model.gguf"), tmp_path / "hf", "huggingface")
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(reference_model(tmp_path / "hf")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("target", ["huggingface", "meta", "int8"])
def test_nothing_of_the_way_stays_in_the_output(tmp_path: Path, target: Target) -> None:
    save_gguf(tmp_path / "model.gguf", plain_llama(tmp_path / "m"))
    convert(str(tmp_path / "model.gguf"), tmp_path / "out", target, calibrate=False)
    assert [path for path in (tmp_path / "out").rglob("*") if path.name.startswith(".") or path.is_dir()] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "model.gguf", "out"]
