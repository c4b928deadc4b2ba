"""The fused decoder layers against the layers as transformers wrote them: same log-probabilities, adapters included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from local_engine import local_engine
from polyhead_core.backbone import load_backbone
from polyhead_server.engine.runner import Runner
from tiny import CONFIGS, save_adapter, save_backbone

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ("llama", "llama-untied", "qwen2", "qwen3", "mistral", "gemma")
GENERIC = tuple(name for name in CONFIGS if name not in FUSED)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("family", FUSED)
def test_scores_equal_the_untouched_layers(family: str, tmp_path: Path, cache: Path) -> None:
    """Mixed batches: chunks of a prompt beside whole ones, adapters of several ranks and none; blocks of odd sizes."""
    backbone, adapters = tmp_path / "backbone", tmp_path / "adapters"
    save_backbone(family, backbone)
    for rank, targets in ((4, LINEARS), (16, ["q_proj", "v_proj"]), (40, ["down_proj", "gate_proj"])):
        save_adapter(backbone, adapters / f"r{rank}", seed=rank, r=rank, target_modules=targets)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, 280, (length,), generator=generator).tolist() for length in (3, 17, 61, 33, 90)]
    asked = list(zip(prompts, (None, "r4", "r16", "r40", "r4"), strict=True))
    scores = []
    for fuse, block_size in ((False, 16), (True, 16), (True, 5)):
        settings = {"fuse_layers": fuse, "kv_block_size": block_size, "max_batch_tokens": 50}
        with local_engine(backbone, cache, adapters=adapters, **settings) as engine:
            assert engine.engine._runner.num_fused_layers == (3 if fuse else 0)
            answers = [engine.submit(ids, name, score_prompt=True) for ids, name in asked]
            scores.append(torch.tensor([p for answer in answers for p in answer.prompt_logprobs]))
    generic, fused, small_blocks = scores
    # Equal up to rounding, but for tokens where rounding moved a value to the next int8 level somewhere.
    difference = (fused - generic).abs()
    assert difference.median() < 1e-3
    assert difference.mean() < 0.05
    assert torch.equal(fused, small_blocks)


@pytest.mark.parametrize("family", GENERIC)
def test_other_architectures_stay_as_they_are(family: str, tmp_path: Path, cache: Path) -> None:
    save_backbone(family, tmp_path)
    runner = Runner(load_backbone(str(tmp_path), cache_dir=cache), block_size=16, kv_cache_bytes=1 << 20)
    assert runner.num_fused_layers == 0


def test_a_layer_that_computes_something_else_is_not_fused(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It looks like the others; only its numbers tell. Its neighbours are fused around it."""
    save_backbone("llama", tmp_path)
    backbone = load_backbone(str(tmp_path), cache_dir=cache)
    odd = backbone.model.model.layers[1]
    original = odd.forward
    odd.forward = lambda x, **settings: x + 0.5 * (original(x, **settings) - x)
    runner = Runner(backbone, block_size=16, kv_cache_bytes=1 << 20)
    assert runner.num_fused_layers == 2
    assert "layer 1 of model.layers is not what the fused call computes" in caplog.text


def test_a_norm_that_rounds_by_the_number_of_rows_does_not_bar_the_way_past_the_tree(
    tmp_path: Path, cache: Path
) -> None:
    """As on CUDA, where torch sums up a row in an order that depends on the rows beside it; without that way nothing is
    recorded as a CUDA graph."""
    save_backbone("llama", tmp_path)
    backbone = load_backbone(str(tmp_path), cache_dir=cache)
    norm = backbone.model.model.norm
    original = norm.forward
    norm.forward = lambda x: original(x) * (1 + 1e-4 * (x.numel() // x.shape[-1] - 1))
    runner = Runner(backbone, block_size=16, kv_cache_bytes=1 << 20)
    assert runner.fused is not None
    assert runner.fused.direct is not None
