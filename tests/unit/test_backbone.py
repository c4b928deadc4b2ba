"""Loading, converting and identifying backbones, on tiny models and on one big enough to weigh its memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from polyhead_core.backbone import gguf as gguf_module
from polyhead_core.backbone import load_backbone, resolve_source
from polyhead_core.backbone.checkpoint import fingerprint
from polyhead_core.backbone.convert import quantize_directory, save_int8
from polyhead_core.backbone.source import convert_gguf
from polyhead_core.errors import BackboneError, ConfigError
from polyhead_core.int8 import Int8Linear, quantize_weight
from polyhead_core.sites import SiteKind
from tiny import CONFIGS, reference_model, save_backbone

IDS = torch.arange(4, 44).view(1, -1)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_unquantised_logits_equal_transformers(kind: str, tmp_path: Path) -> None:
    directory = save_backbone(kind, tmp_path / "model")
    backbone = load_backbone(str(directory), quantization="none", cache_dir=tmp_path / "cache")
    with torch.no_grad():
        torch.testing.assert_close(backbone.model(IDS).logits, reference_model(directory)(IDS).logits)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_int8_loads_every_linear_layer_and_stays_close(kind: str, tmp_path: Path) -> None:
    directory = save_backbone(kind, tmp_path / "model")
    backbone = load_backbone(str(directory), cache_dir=tmp_path / "cache")
    linears = [m for m in backbone.model.modules() if isinstance(m, torch.nn.Linear)]
    assert linears
    assert all(isinstance(m, Int8Linear) for m in linears)
    with torch.no_grad():
        ours, exact = backbone.model(IDS).logits, reference_model(directory)(IDS).logits
    assert (ours - exact).norm() / exact.norm() < 0.15
    assert backbone.num_bytes < 0.5 * sum(p.nbytes for p in reference_model(directory).parameters())


def test_a_converted_backbone_is_loaded_from_the_cache_the_second_time(tmp_path: Path) -> None:
    directory = save_backbone("llama", tmp_path / "model")
    first = load_backbone(str(directory), cache_dir=tmp_path / "cache")
    again = load_backbone(str(directory), cache_dir=tmp_path / "cache")
    with torch.no_grad():
        assert torch.equal(first.model(IDS).logits, again.model(IDS).logits)


def test_sharded_checkpoints_have_the_same_fingerprint_and_load(tmp_path: Path) -> None:
    single = save_backbone("qwen2", tmp_path / "single")
    reference_model(single).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    for file in single.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    cache = tmp_path / "cache"
    one, other = (load_backbone(str(tmp_path / name), cache_dir=cache) for name in ("single", "sharded"))
    assert one.fingerprint == other.fingerprint
    assert load_backbone(str(tmp_path / "sharded"), quantization="none", cache_dir=cache).fingerprint == one.fingerprint
    changed = save_backbone("qwen2", tmp_path / "changed", seed=1)
    assert fingerprint(changed, cache) != one.fingerprint


def test_an_int8_checkpoint_saved_by_bitsandbytes_loads(tmp_path: Path) -> None:
    directory = save_backbone("llama-untied", tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(
        directory,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["none"]),
        device_map="cpu",
    )
    theirs.save_pretrained(tmp_path / "bnb")
    for file in directory.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "bnb")
    backbone = load_backbone(str(tmp_path / "bnb"), cache_dir=tmp_path / "cache")
    for path, module in theirs.named_modules():
        if hasattr(module, "weight") and module.weight is not None and module.weight.dtype == torch.int8:
            ours = backbone.model.get_submodule(path)
            assert torch.equal(ours.weight, module.weight)
            assert torch.equal(ours.SCB, module.weight.SCB)
    with torch.no_grad():
        exact = reference_model(directory)(IDS).logits
        assert (backbone.model(IDS).logits - exact).norm() / exact.norm() < 0.15
    with pytest.raises(ConfigError, match="saved in int8"):
        load_backbone(str(tmp_path / "bnb"), quantization="none", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("kind", ["llama", "llama-untied"])
def test_a_head_that_bitsandbytes_left_unquantised_is_quantised_at_load(kind: str, tmp_path: Path) -> None:
    directory = save_backbone(kind, tmp_path / "model")
    settings = BitsAndBytesConfig(load_in_8bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(directory, quantization_config=settings, device_map="cpu")
    assert theirs.lm_head.weight.dtype != torch.int8
    theirs.save_pretrained(tmp_path / "bnb")
    for file in directory.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "bnb")
    backbone = load_backbone(str(tmp_path / "bnb"), cache_dir=tmp_path / "cache")
    expected_OI, expected_O = quantize_weight(theirs.lm_head.weight.detach())
    head = backbone.model.get_submodule("lm_head")
    assert isinstance(head, Int8Linear)
    assert torch.equal(head.weight, expected_OI)
    assert torch.equal(head.SCB, expected_O)
    with torch.no_grad():
        exact = reference_model(directory)(IDS).logits
        assert (backbone.model(IDS).logits - exact).norm() / exact.norm() < 0.15


def test_bitsandbytes_loads_a_plain_int8_checkpoint_of_ours(tmp_path: Path) -> None:
    directory = save_backbone("llama-untied", tmp_path / "model")
    ours = quantize_directory(directory)
    (tmp_path / "int8").mkdir()
    save_int8(ours, tmp_path / "int8")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", device_map="cpu")
    for path, module in ours.named_modules():
        if isinstance(module, Int8Linear):
            layer = theirs.get_submodule(path)
            assert type(layer).__name__ == "Linear8bitLt"
            assert torch.equal(layer.weight.data, module.weight)
            assert torch.equal(layer.weight.SCB, module.SCB)


def test_no_other_loader_takes_a_calibrated_directory_for_a_plain_one(tmp_path: Path) -> None:
    directory = save_backbone("llama-untied", tmp_path / "model")
    converted = load_backbone(str(directory), cache_dir=tmp_path / "cache")
    (calibrated,) = (tmp_path / "cache" / "int8").iterdir()
    settings = json.loads((calibrated / "config.json").read_text())["quantization_config"]
    assert settings == {"quant_method": "polyhead_int8"}
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(calibrated, device_map="cpu")
    for file in directory.glob("tokenizer*"):
        shutil.copy(file, calibrated)
    reloaded = load_backbone(str(calibrated), cache_dir=tmp_path / "cache")
    with torch.no_grad():
        assert torch.equal(reloaded.model(IDS).logits, converted.model(IDS).logits)


def test_sites_are_the_embedding_and_every_linear_layer(tmp_path: Path) -> None:
    backbone = load_backbone(
        str(save_backbone("llama", tmp_path / "m")), quantization="none", cache_dir=tmp_path / "cache"
    )
    sites = backbone.sites
    assert [s.path for s in sites if s.kind is SiteKind.EMBED] == ["model.embed_tokens"]
    assert [s.path for s in sites if s.is_head] == ["lm_head"]
    assert len(sites) == 1 + 3 * 7 + 1
    assert (sites.by_path["model.layers.2.mlp.down_proj"].in_features, sites.by_path["lm_head"].out_features) == (
        96,
        288,
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/at/all", "neither 'default'"),
        ("not a hub id", "neither 'default'"),
        ("", "neither 'default'"),
    ],
)
def test_sources_that_name_nothing(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=message):
        resolve_source(source or "\0", tmp_path) if source == "" else resolve_source(source, tmp_path)


def test_broken_directories_say_what_is_wrong(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match=r"without config\.json"):
        load_backbone(str(tmp_path / "empty"), cache_dir=cache)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(BackboneError, match=r"not a \.gguf"):
        load_backbone(str(tmp_path / "model.bin"), cache_dir=cache)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(BackboneError, match="as GGUF"):
        load_backbone(str(tmp_path / "broken.gguf"), cache_dir=cache)
    good = save_backbone("llama", tmp_path / "model")
    truncated = shutil.copytree(good, tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(BackboneError, match="cannot read"):
        load_backbone(str(truncated), cache_dir=cache)
    wider = shutil.copytree(good, tmp_path / "wider")
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(BackboneError, match="has shape"):
        load_backbone(str(wider), cache_dir=cache)
    with pytest.raises(BackboneError, match="has shape"):
        load_backbone(str(wider), quantization="none", cache_dir=cache)


def test_a_hub_id_in_the_local_hub_cache_loads_offline(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    hub, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    repository = hub / "models--someone--tiny-llama"
    directory = save_backbone("llama", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    arguments = ["someone/tiny-llama", str(tmp_path / "cache")]
    done = subprocess.run(
        [sys.executable, "-c", _LOAD_BY_ID, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    fingerprint_there, argmax_there = done.stdout.split()
    here = load_backbone(str(directory), quantization="none", cache_dir=tmp_path / "cache")
    assert fingerprint_there == here.fingerprint
    assert int(argmax_there) == int(here.model(IDS).logits[0, -1].argmax())
    missing = subprocess.run(
        [sys.executable, "-c", _LOAD_BY_ID, "someone/else", arguments[1]],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "BackboneError: cannot fetch backbone 'someone/else' from the hub" in missing.stderr


_LOAD_BY_ID = """
import sys, torch
from pathlib import Path
from polyhead_core.backbone import load_backbone
backbone = load_backbone(sys.argv[1], quantization="none", cache_dir=Path(sys.argv[2]))
print(backbone.fingerprint, int(backbone.model(torch.arange(4, 44).view(1, -1)).logits[0, -1].argmax()))
"""


def test_two_first_starts_at_once_convert_without_meeting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_backbone("llama", tmp_path / "model")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF, as far as this test goes")
    both_have_begun = threading.Barrier(2, timeout=60)

    def write_together(_: Path, staging: Path) -> None:
        shutil.copytree(directory, staging, dirs_exist_ok=True)
        both_have_begun.wait()

    monkeypatch.setattr(gguf_module, "gguf_to_directory", write_together)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: convert_gguf(gguf, tmp_path / "cache"), range(2)))
    monkeypatch.undo()
    assert found[0] == found[1]
    assert [path.name for path in found[0].parent.iterdir()] == [found[0].name], "staging is left behind"
    with torch.no_grad():
        backbone = load_backbone(str(found[0]), quantization="none", cache_dir=tmp_path / "cache")
        torch.testing.assert_close(backbone.model(IDS).logits, reference_model(directory)(IDS).logits)


_WEIGH = """
import re, sys, torch
from pathlib import Path
from polyhead_core.backbone import load_backbone
from polyhead_core.kernels.cpu import build
build.load()
torch.set_num_threads(1)
load_backbone(sys.argv[1], quantization=sys.argv[3], cache_dir=Path(sys.argv[2]))  # what the libraries take themselves
def peak():  # not ru_maxrss: a child inherits its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
backbone = load_backbone(sys.argv[4], quantization=sys.argv[3], dtype=sys.argv[5], cache_dir=Path(sys.argv[2]))
touched = sum(float(p.float().sum() * 0) for p in backbone.model.parameters() if p.numel() < 1e6)
print((peak() - before) * 1024)
"""


@pytest.mark.parametrize(
    ("kind", "quantization", "dtype"),
    [
        pytest.param("llama-untied", "int8", "float32", marks=pytest.mark.slow),
        pytest.param("llama-untied", "none", "bfloat16", marks=pytest.mark.slow),
        ("llama", "int8", "float32"),
    ],
)
def test_loading_needs_at_most_1_3_times_the_checkpoint(
    kind: str, quantization: str, dtype: str, tmp_path: Path
) -> None:
    small = save_backbone("llama", tmp_path / "small")
    big = save_backbone(
        kind,
        tmp_path / "big",
        vocab_size=40000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
    )
    reference_model(big).to(torch.bfloat16).save_pretrained(big)
    num_bytes = sum(file.stat().st_size for file in big.glob("*.safetensors"))
    assert num_bytes > 220e6
    arguments = [str(small), str(tmp_path / "cache"), quantization, str(big), dtype]
    result = subprocess.run([sys.executable, "-c", _WEIGH, *arguments], capture_output=True, text=True, check=True)
    peak = float(result.stdout)
    print(f"{peak / num_bytes:.2f} times the checkpoint")
    assert peak > 0.2 * num_bytes, "nothing was measured"
    assert peak <= 1.3 * num_bytes, f"{peak / num_bytes:.2f} times the checkpoint"
