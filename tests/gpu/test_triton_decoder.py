"""Decoder layers as Triton launches: against the reference and, inside the engine, against the untouched layers.

On a CUDA device by `make test-gpu`; elsewhere in Triton's interpreter with all other tests, where triton is installed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install triton): its kernels are not tested")

from decoder_cases import decoder_case
from kernel_cases import DEVICE
from local_engine import LocalEngine
from polyhead_core.backbone import load_backbone
from polyhead_core.kernels.triton import int8_linear, tuning
from polyhead_core.kernels.triton.decoder import TritonDecoderStack
from polyhead_server.config import ServerConfig
from tiny import save_adapter, save_backbone

if DEVICE.type == "cuda":
    pytestmark = pytest.mark.gpu

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("seed", range(3))
def test_a_layer_equals_the_reference(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(tuning, "w8a8_product", lambda _rows, _weight: int8_linear.int8_product)
    settings = {"head_norms": seed == 1, "adapters": seed != 2, "num_layers": 1 + (seed == 0)}
    first, second = (decoder_case(seed, DEVICE, **settings) for _ in range(2))
    expected = first.by_reference()
    second.assert_same_as(first, second.by(TritonDecoderStack(second.shape)), expected)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter would take minutes, and misreads bfloat16 products")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama-untied", "qwen2", "qwen3", "mistral", "gemma"])
def test_scores_equal_the_untouched_layers(family: str, dtype: str, tmp_path: Path) -> None:
    """A prompt in chunks, adapters of several ranks at all sites and at some, and rows with none.

    In float32 so are keys and values: the fused layers round queries to the pages' type, the others do not. In bfloat16
    the others also round what goes from layer to layer, which is float32 in the fused ones: that alone makes medians of
    0.02 to 0.03 here, by the reference on a CPU.
    """
    backbone, adapters = tmp_path / "backbone", tmp_path / "adapters"
    save_backbone(family, backbone)
    for rank, targets in ((4, LINEARS), (10, ["q_proj", "v_proj", "down_proj"])):
        save_adapter(backbone, adapters / f"r{rank}", seed=rank, r=rank, target_modules=targets)
    generator = torch.Generator().manual_seed(3)
    asked = [
        (torch.randint(4, 280, (length,), generator=generator).tolist(), name)
        for length, name in ((3, None), (5, "r4"), (7, "r10"))
    ]
    scores = []
    for fuse in (False, True):
        config = ServerConfig(
            adapters=str(adapters), device=DEVICE.type, dtype=dtype, kv_cache_bytes=1 << 20,
            adapter_pool_bytes=8 << 20, max_batch_tokens=9, max_adapter_rank=16, num_threads=1, fuse_layers=fuse,
            kv_dtype=dtype,
        )  # fmt: skip
        cache = tmp_path / "cache"
        engine = LocalEngine(load_backbone(str(backbone), dtype=dtype, device=DEVICE.type, cache_dir=cache), config)
        try:
            assert engine.engine._runner.num_fused_layers == (3 if fuse else 0)
            answers = [engine.submit(ids, name, score_prompt=True, max_tokens=2) for ids, name in asked]
            scores.append(torch.tensor([p for answer in answers for p in answer.prompt_logprobs]))
        finally:
            engine.close()
    generic, fused = scores
    # Equal up to rounding, but for tokens where rounding moved a value to the next int8 level somewhere.
    difference = (fused - generic).abs()
    assert difference.median() < (2e-3 if dtype == "float32" else 0.1)
    assert difference.mean() < (0.05 if dtype == "float32" else 0.2)
