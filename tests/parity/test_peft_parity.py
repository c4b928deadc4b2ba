"""The final word on correctness: log-probabilities and greedy tokens equal peft + transformers', in mixed batches.

One row per kind of adapter, run for every architecture; all adapters of an architecture share each batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from local_engine import LocalEngine, local_engine
from tiny import CONFIGS, TARGETS, reference_model, save_adapter, save_backbone

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Row:
    """`settings` are LoraConfig's; a callable is given the architecture's linear targets."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    targets: Callable[[list[str]], list[str]] = lambda linear: linear


ROWS = [
    Row("rank 8 on two", {"r": 8, "lora_alpha": 16}, lambda linear: linear[:2]),
    Row("rank 1", {"r": 1, "lora_alpha": 2}),
    Row("rank 64", {"r": 64, "lora_alpha": 16}),
    Row("rank 5, alpha 3", {"r": 5, "lora_alpha": 3}, lambda linear: linear[-1:]),
    Row("rslora", {"r": 16, "lora_alpha": 4, "use_rslora": True}),
    Row(
        "patterns",
        {
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"layers.1": 12, r".*\.layers\.2\..*proj": 24},
            "alpha_pattern": {"layers.1": 20, r"layers\.0\..*": 5},
        },
    ),
    Row("patterns with rslora", {"r": 8, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"layers.0": 33}}),
    Row("bias all", {"r": 8, "lora_alpha": 8, "bias": "all"}),
    Row("bias of the adapted layers", {"r": 8, "lora_alpha": 8, "bias": "lora_only"}),
    Row("lora bias", {"r": 8, "lora_alpha": 8, "lora_bias": True}),
    Row("one layer only", {"r": 16, "lora_alpha": 16, "layers_to_transform": [1]}),
    Row("head", {"r": 8, "lora_alpha": 8}, lambda linear: ["lm_head"]),
    Row("embedding", {"r": 8, "lora_alpha": 8}, lambda linear: ["@embedding"]),
    Row("everything", {"r": 20, "lora_alpha": 8}, lambda linear: [*linear, "lm_head", "@embedding"]),
]


def embedding_name(model: PreTrainedModel) -> str:
    return next(
        name.rpartition(".")[2] for name, module in model.named_modules() if module is model.get_input_embeddings()
    )


def make_adapters(kind: str, backbone: Path, folder: Path) -> dict[str, Path]:
    embedding = embedding_name(reference_model(backbone))
    made = {}
    for seed, row in enumerate(ROWS):
        wanted = row.targets(TARGETS[kind])
        if row.settings.get("lora_bias") and not _has_biases(reference_model(backbone), wanted):
            continue  # PEFT itself refuses lora_bias on a layer without a bias
        targets = [embedding if name == "@embedding" else name for name in wanted]
        name = row.name.replace(" ", "-").replace(",", "")
        made[name] = save_adapter(backbone, folder / name, seed=seed, target_modules=targets, **row.settings)
    return made


def _has_biases(model: PreTrainedModel, names: list[str]) -> bool:
    layers = [m for path, m in model.named_modules() if path.rpartition(".")[2] in names]
    return bool(layers) and all(getattr(layer, "bias", None) is not None for layer in layers)


@torch.no_grad()
def expected_logprobs(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    logprobs = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


@torch.no_grad()
def expected_tokens(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def prompts(count: int, vocabulary: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
    return [torch.randint(4, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def check_parity(
    engine: LocalEngine,
    adapters: dict[str, Path],
    load: Callable[[], PreTrainedModel],
    asked: list[list[int]],
    count: int,
) -> None:
    names: list[str | None] = [None, *adapters, None]
    scores = [engine.submit(p, name, score_prompt=True) for name, p in zip(names, asked, strict=True)]
    greedy = [engine.submit(p, name, max_tokens=count, min_tokens=count) for name, p in zip(names, asked, strict=True)]
    for name, prompt, score, answer in zip(names, asked, scores, greedy, strict=True):
        model = load()
        if name is not None:
            model = PeftModel.from_pretrained(model, adapters[name]).eval()
        difference = (torch.tensor(score.prompt_logprobs) - expected_logprobs(model, prompt)).abs().max()
        assert difference <= TOLERANCE, f"{name}: log-probabilities differ by {difference}"
        assert answer.tokens() == expected_tokens(model, prompt, count), f"{name}: greedy tokens differ"


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_mixed_batches_equal_peft(kind: str, tmp_path: Path) -> None:
    backbone = save_backbone(kind, tmp_path / "backbone")
    adapters = make_adapters(kind, backbone, tmp_path / "adapters")
    asked = prompts(len(adapters) + 2, 288, 60)
    with local_engine(
        backbone, tmp_path / "cache", quantization="none", adapters=tmp_path / "adapters", max_batch_tokens=48
    ) as engine:
        check_parity(engine, adapters, lambda: reference_model(backbone), asked, 12)


def test_the_default_backbone_equals_peft(tmp_path: Path, default_directory: Path) -> None:
    adapters = {
        name: save_adapter(default_directory, tmp_path / "adapters" / name, seed=seed, scale=0.1, **settings)
        for seed, (name, settings) in enumerate(
            {
                "qv": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
                "all": {"r": 13, "lora_alpha": 26, "use_rslora": True, "target_modules": "all-linear"},
                "ends": {"r": 4, "lora_alpha": 4, "target_modules": ["embed_tokens", "lm_head", "down_proj"]},
            }.items()
        )
    }
    asked = prompts(len(adapters) + 2, 49000, 40)
    settings = {"kv_cache_bytes": 64 << 20, "num_threads": 2}
    with local_engine(
        default_directory, None, quantization="none", adapters=tmp_path / "adapters", **settings
    ) as engine:
        check_parity(engine, adapters, lambda: reference_model(default_directory), asked, 8)
