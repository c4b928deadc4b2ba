"""`trainer merge` against peft's own merge and against the adapter left apart; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from encoder_decoders import save_encoder_decoder
from polyhead_core.adapter_directory import stamp_backbone
from polyhead_core.backbone.checkpoint import fingerprint
from polyhead_core.errors import AdapterMismatch, PolyheadError
from polyhead_trainer.convert.run import convert
from polyhead_trainer.errors import MergeRefused, OutputExists
from polyhead_trainer.merge import merge
from tiny import reference_model, save_adapter, save_backbone

IDS = torch.arange(4, 40)[None]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"r": 4, "target_modules": LINEAR}),
        ("llama-untied", {"r": 3, "use_rslora": True, "target_modules": LINEAR}),
        ("gpt_neox", {"r": 4, "target_modules": ["query_key_value", "dense_4h_to_h"], "bias": "lora_only"}),
        ("qwen2", {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}, "target_modules": LINEAR}),
    ],
)
def test_the_merged_model_is_pefts_and_the_adapters(tmp_path: Path, kind: str, settings: dict[str, object]) -> None:
    backbone = save_backbone(kind, tmp_path / "backbone")
    adapter = save_adapter(backbone, tmp_path / "adapter", seed=3, **settings)
    merge(adapter, tmp_path / "merged", backbone=str(backbone), cache_dir=tmp_path / "cache")
    apart = PeftModel.from_pretrained(reference_model(backbone), str(adapter)).eval()
    with torch.no_grad():
        plain, unmerged = reference_model(backbone)(IDS).logits, apart(IDS).logits
        theirs = apart.merge_and_unload()(IDS).logits
        ours = reference_model(tmp_path / "merged")(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, unmerged, rtol=1e-3, atol=1e-3)
    assert (plain - unmerged).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("abc")["input_ids"]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_is_merged_too(tmp_path: Path, kind: str) -> None:
    backbone = save_encoder_decoder(tmp_path / "backbone", kind)
    model = get_peft_model(
        AutoModelForSeq2SeqLM.from_pretrained(backbone),
        LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules="all-linear", init_lora_weights=False),
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", backbone=str(backbone), cache_dir=tmp_path / "cache")
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found, wanted = (one(input_ids=IDS, decoder_input_ids=IDS[:, :9]).logits for one in (merged, model))
        with model.disable_adapter():
            plain = model(input_ids=IDS, decoder_input_ids=IDS[:, :9]).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert (plain - wanted).abs().max() > 0.1


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_weight_is_untied_where_one_side_changes(tmp_path: Path, target: str) -> None:
    backbone = save_backbone("llama", tmp_path / "backbone")
    adapter = save_adapter(backbone, tmp_path / "adapter", seed=3, r=4, target_modules=["q_proj", target])
    merge(adapter, tmp_path / "merged", backbone=str(backbone), cache_dir=tmp_path / "cache")
    apart = PeftModel.from_pretrained(reference_model(backbone), str(adapter)).eval()
    with torch.no_grad():
        merged = reference_model(tmp_path / "merged")(IDS).logits
        torch.testing.assert_close(merged, apart(IDS).logits, rtol=1e-3, atol=1e-3)


def test_bfloat16_is_the_rounded_float32_merge(tmp_path: Path) -> None:
    backbone = save_backbone("llama", tmp_path / "backbone")
    adapter = save_adapter(backbone, tmp_path / "adapter", seed=3, r=4, target_modules=LINEAR)
    for name in ("float32", "bfloat16"):
        merge(adapter, tmp_path / name, backbone=str(backbone), dtype=name, cache_dir=tmp_path / "cache")
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("float32", "bfloat16"))
    assert set(exact) == set(rounded)
    assert all(torch.equal(tensor.bfloat16(), rounded[name]) for name, tensor in exact.items())
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_was_trained_on_a_converted_backbone_is_merged_into_its_source(tmp_path: Path) -> None:
    backbone = save_backbone("llama", tmp_path / "backbone")
    adapter = save_adapter(backbone, tmp_path / "adapter", seed=3, r=4, target_modules=["q_proj"])
    convert(str(backbone), tmp_path / "int8", "int8")
    stamp_backbone(adapter, fingerprint=fingerprint(tmp_path / "int8", tmp_path / "cache"), quantization="int8")
    merge(adapter, tmp_path / "merged", backbone=str(backbone), cache_dir=tmp_path / "cache")
    assert load_file(tmp_path / "merged" / "model.safetensors")


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    backbone = save_backbone("llama", tmp_path / "backbone")
    adapter = save_adapter(backbone, tmp_path / "adapter", seed=3, r=4, target_modules=["q_proj"])

    def refused(message: str, source: Path = backbone, error: type[PolyheadError] = MergeRefused) -> None:
        with pytest.raises(error, match=message):
            merge(adapter, tmp_path / "merged", backbone=str(source), cache_dir=tmp_path / "cache")
        assert not (tmp_path / "merged").exists()

    convert(str(backbone), tmp_path / "int8", "int8", calibrate=False)
    refused("is in int8: its steps are larger", tmp_path / "int8")
    refused("peft cannot put", save_backbone("llama", tmp_path / "wide", hidden_size=128))
    stamp_backbone(adapter, fingerprint="0" * 64, quantization="int8")
    refused("was trained on the backbone with fingerprint 0000", error=AdapterMismatch)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    refused("lacks 1 tensors that its configuration asks for")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "PROMPT_TUNING"}))
    refused("is of type PROMPT_TUNING: only LORA and IA3")


def test_a_classifiers_scores_are_not_dropped(tmp_path: Path) -> None:
    backbone = save_backbone("llama", tmp_path / "backbone")
    base = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=3)
    get_peft_model(base, IA3Config(task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        MergeRefused, match=r"is a classifier's: its trained scores have no place.*adapter\.method = full"
    ):
        merge(tmp_path / "adapter", tmp_path / "merged", backbone=str(backbone), cache_dir=tmp_path / "cache")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["score.weight", "model.layers.9.self_attn.q_proj.lora_A.weight"])
def test_tensors_without_a_place_are_not_dropped(tmp_path: Path, name: str) -> None:
    backbone = save_backbone("llama", tmp_path / "backbone")
    adapter = save_adapter(backbone, tmp_path / "adapter", seed=3, r=4, target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"base_model.model.{name}"] = torch.ones(4, 64)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeRefused, match=rf"holds 1 tensors that have no place.*: base_model\.model\.{name}"):
        merge(adapter, tmp_path / "merged", backbone=str(backbone), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_a_saved_embedding_matrix_has_its_place(tmp_path: Path, target: str) -> None:
    backbone = save_backbone("llama-untied", tmp_path / "backbone")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[target], init_lora_weights=False)
    model = get_peft_model(reference_model(backbone), config)
    model.get_input_embeddings().weight.data += 0.1
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge(tmp_path / "adapter", tmp_path / "merged", backbone=str(backbone), cache_dir=tmp_path / "cache")
    with torch.no_grad():
        merged = reference_model(tmp_path / "merged")(IDS).logits
        torch.testing.assert_close(merged, model.eval()(IDS).logits, rtol=1e-3, atol=1e-3)


def test_the_backbone_is_the_one_that_the_adapter_names(tmp_path: Path) -> None:
    backbone = save_backbone("llama", tmp_path / "backbone")
    adapter = save_adapter(backbone, tmp_path / "adapter", seed=3, r=4, target_modules=["q_proj"])
    merged = merge(adapter, tmp_path / "merged", cache_dir=tmp_path / "cache")
    assert merged.source == str(backbone)
    with pytest.raises(OutputExists):
        merge(adapter, tmp_path / "merged", cache_dir=tmp_path / "cache")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(MergeRefused, match="give it with --backbone"):
        merge(adapter, tmp_path / "other", cache_dir=tmp_path / "cache")
