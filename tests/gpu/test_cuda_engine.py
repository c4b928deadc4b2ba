"""The engine on CUDA against peft + transformers on the CPU. Needs a device: `make test-gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from local_engine import LocalEngine
from polyhead_core.backbone import load_backbone
from polyhead_core.int8 import Int8Linear
from polyhead_core.kernels import reference
from polyhead_server.config import ServerConfig
from polyhead_server.engine.sampler import SamplerRow, sample
from polyhead_server.request import SamplingParams
from tiny import TARGETS, reference_model, save_adapter, save_backbone

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROMPT = list(range(10, 60))


@pytest.mark.parametrize("rows", [1, 3, 17, 64])
def test_int8_linear_equals_the_cpu_reference(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    layer = Int8Linear.from_weight(
        torch.randn(96, 64, generator=generator), None, torch.rand(64, generator=generator) + 0.5, torch.tensor([1, 9])
    )
    x = torch.randn(rows, 64, generator=generator)
    expected = reference.int8_linear(
        x, layer.weight, layer.SCB, layer.input_scale, layer.outlier_columns, layer.outlier_weight
    )
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_greedy_tokens_equal_the_cpu(quantization: str, tmp_path: Path) -> None:
    directory = save_backbone("llama", tmp_path / "backbone")
    adapter = save_adapter(directory, tmp_path / "adapters" / "a", seed=1, r=8, target_modules=TARGETS["llama"])
    config = ServerConfig(
        adapters=str(tmp_path / "adapters"),
        quantization=quantization,
        dtype="float32",
        device="cuda",
        kv_cache_bytes=16 << 20,
        adapter_pool_bytes=16 << 20,
    )
    backbone = load_backbone(
        str(directory), quantization=quantization, dtype="float32", device="cuda", cache_dir=tmp_path / "cache"
    )
    engine = LocalEngine(backbone, config)
    try:
        score = torch.tensor(engine.submit(PROMPT, "a", score_prompt=True).prompt_logprobs)
    finally:
        engine.close()
    model = PeftModel.from_pretrained(reference_model(directory), adapter).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    assert (score - expected).abs().max() < (1e-3 if quantization == "none" else 1.0)


def test_tokens_of_logits_on_the_device_are_those_on_the_host() -> None:
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(3)) * 3
    logits[4, 7] = torch.nan
    asked = [
        SamplingParams(temperature=1.0, top_p=0.9, seed=1),
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.2, seed=2),
        SamplingParams(repetition_penalty=1.2),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, min_p=0.1, seed=3),
    ]
    on_host, on_device = (
        sample(one, [SamplerRow(params, [1, 2, 3], 2, params.seed or 0, (0,)) for params in asked])
        for one in (logits, logits.cuda())
    )
    assert [one for one in on_device if one is not on_device[4]] == [one for one in on_host if one is not on_host[4]]
    assert type(on_device[4]) is type(on_host[4])


def test_recorded_decode_steps_give_the_same_tokens(tmp_path: Path) -> None:
    """Rows come and go, adapters are loaded meanwhile, and every size is recorded or replayed."""
    directory = save_backbone("llama", tmp_path / "backbone")
    for number in range(4):
        targets = TARGETS["llama"] if number % 2 else ["q_proj", "v_proj"]
        save_adapter(
            directory, tmp_path / "adapters" / f"a{number}", seed=number, r=4 + 4 * number, target_modules=targets
        )
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 280, (length,), generator=generator).tolist() for length in (3, 40, 17, 9, 120, 5, 8)]
    names = [None, "a0", "a1", None, "a2", "a3", "a1"]
    found = []
    for graphs in (False, True):
        config = ServerConfig(
            adapters=str(tmp_path / "adapters"), device="cuda", kv_cache_bytes=16 << 20, adapter_pool_bytes=16 << 20,
            cuda_graphs=graphs, max_batch_rows=8,
        )  # fmt: skip
        engine = LocalEngine(load_backbone(str(directory), device="cuda", cache_dir=tmp_path / "cache"), config)
        try:
            assert engine.engine.num_fused_layers == 3
            assert (engine.engine._runner.graphs is not None) == graphs
            asked = [
                engine.submit(ids, name, max_tokens=10 + 7 * row, ignore_eos=True)
                for row, (ids, name) in enumerate(zip(prompts, names, strict=True))
            ]
            found.append([answer.tokens() for answer in asked])
            recorded = engine.engine._runner.graphs
            assert recorded is None or (recorded._recordings and not recorded._failed)
        finally:
            engine.close()
    assert found[0] == found[1]
