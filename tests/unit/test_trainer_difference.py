"""`trainer difference`: a change of rank r comes back whole; what a lower rank loses is what linear algebra says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from typer.testing import CliRunner

from local_engine import local_engine
from polyhead_core.adapter_directory import read_adapter_directory
from polyhead_core.backbone import load_backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer.cli import app
from polyhead_trainer.difference import Difference, export_difference, truncated_svd
from polyhead_trainer.errors import DifferenceRefused
from tiny import reference_model, save_backbone

TOKENS = torch.randint(4, 280, (2, 24), generator=torch.Generator().manual_seed(5))
Change = Callable[[str, torch.Tensor], torch.Tensor]


def of_rank(rank: int, size: float = 0.05) -> Change:
    """Adds a random matrix of this rank to every linear layer's weight of the decoder."""
    generator = torch.Generator().manual_seed(rank)

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if not name.endswith("_proj.weight"):
            return weight
        left = torch.randn(weight.shape[0], rank, generator=generator)
        return weight + size * left @ torch.randn(rank, weight.shape[1], generator=generator)

    return change


def tuned_copy(base: Path, directory: Path, change: Change) -> Path:
    """Saves `base` with every parameter changed, as a full fine-tune would leave it."""
    model = reference_model(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(change(name, parameter))
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    (directory / "tokenizer_config.json").write_bytes((base / "tokenizer_config.json").read_bytes())
    return directory


def export(tmp_path: Path, base: Path, tuned: Path, rank: int, name: str = "out") -> Difference:
    return export_difference(str(base), str(tuned), tmp_path / name, rank=rank, cache_dir=tmp_path / "cache")


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi"])
def test_a_change_of_rank_r_comes_back_through_stock_peft(tmp_path: Path, kind: str) -> None:
    base = save_backbone(kind, tmp_path / "base")
    tuned = tuned_copy(base, tmp_path / "tuned", of_rank(4))
    difference = export(tmp_path, base, tuned, rank=4)
    assert difference.relative_error < 1e-5
    assert max(layer.relative_error for layer in difference.layers) < 1e-5
    assert difference.lost == []
    assert difference.lost_share == 0
    expected = reference_model(tuned)
    adapted = PeftModel.from_pretrained(reference_model(base), str(tmp_path / "out"))
    with torch.no_grad():
        wanted, found = expected(TOKENS).logits, adapted(TOKENS).logits
        untouched = reference_model(base)(TOKENS).logits
    assert relative(found, wanted) < 1e-4 < 0.05 < relative(untouched, wanted)
    merged = adapted.merge_and_unload()
    before = dict(reference_model(base).named_parameters())
    for name, parameter in expected.named_parameters():
        if name.endswith("_proj.weight"):
            change = parameter - before[name]
            assert relative(merged.get_parameter(name) - before[name], change) < 1e-5


def test_the_error_of_a_lower_rank_is_what_the_singular_values_say(tmp_path: Path) -> None:
    base = save_backbone("llama-untied", tmp_path / "base")
    generator = torch.Generator().manual_seed(1)

    def noise(name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight + 0.02 * torch.randn(weight.shape, generator=generator)

    tuned = tuned_copy(base, tmp_path / "tuned", noise)
    before, after = (dict(reference_model(path).named_parameters()) for path in (base, tuned))
    models = reference_model(base)
    linear = [path for path, module in models.named_modules() if isinstance(module, nn.Linear)]
    assert "lm_head" in linear
    errors = []
    for rank in (1, 8, 64):
        difference = export(tmp_path, base, tuned, rank, f"rank{rank}")
        assert sorted(layer.layer for layer in difference.layers) == sorted(linear)
        missing = total = 0.0
        for layer in difference.layers:
            change = (after[f"{layer.layer}.weight"] - before[f"{layer.layer}.weight"]).double()
            values = torch.linalg.svdvals(change)
            assert layer.change_norm == pytest.approx(values.norm().item(), rel=1e-4)
            wanted = (values[rank:].norm() / values.norm()).item()
            assert layer.relative_error == pytest.approx(wanted, rel=1e-4, abs=1e-5)
            missing += values[rank:].square().sum().item()
            total += values.square().sum().item()
        assert difference.relative_error == pytest.approx((missing / total) ** 0.5, rel=1e-4, abs=1e-5)
        others = set(before) - {f"{path}.weight" for path in linear}
        assert {lost.parameter for lost in difference.lost} == others
        lost = sum((after[name] - before[name]).square().sum().item() for name in others)
        assert difference.lost_share == pytest.approx(lost / (lost + total), rel=1e-4)
        errors.append(difference.relative_error)
    assert errors[0] > errors[1] > 0.1 > 1e-5 > errors[2]


def test_only_the_layers_that_changed_are_in_the_adapter(tmp_path: Path) -> None:
    base = save_backbone("llama", tmp_path / "base")
    inner = of_rank(2)
    chosen = "model.layers.1.self_attn.q_proj.weight"
    tuned = tuned_copy(base, tmp_path / "tuned", lambda name, w: inner(name, w) if name == chosen else w)
    difference = export(tmp_path, base, tuned, rank=2)
    assert [layer.layer for layer in difference.layers] == ["model.layers.1.self_attn.q_proj"]
    adapter = read_adapter_directory(tmp_path / "out")
    assert sorted(adapter.tensors) == [
        f"base_model.model.model.layers.1.self_attn.q_proj.lora_{side}.weight" for side in "AB"
    ]
    assert adapter.content_hash == difference.content_hash
    assert adapter.quantization == "none"
    assert adapter.backbone_fingerprint == load_backbone(str(base), cache_dir=tmp_path / "cache").fingerprint
    record = json.loads((tmp_path / "out" / "polyhead_difference.json").read_text())
    assert record["layers"][0]["relative_error"] < 1e-5


def test_the_server_serves_it_as_the_full_fine_tune(tmp_path: Path) -> None:
    base = save_backbone("llama", tmp_path / "base")
    tuned = tuned_copy(base, tmp_path / "tuned", of_rank(4))
    export_difference(str(base), str(tuned), tmp_path / "adapters/exported", rank=4, cache_dir=tmp_path / "cache")
    tokens = TOKENS[0].tolist()
    options = {"quantization": "none", "adapters": tmp_path / "adapters"}
    with local_engine(base, tmp_path / "cache", **options) as local:
        answers = [local.submit(tokens, name, max_tokens=1, score_prompt=True) for name in ("exported", None)]
        served, plain = (torch.tensor(answer.prompt_logprobs) for answer in answers)
    with torch.no_grad():
        logprobs = reference_model(tuned)(TOKENS[:1]).logits[0].log_softmax(dim=-1)
    wanted = logprobs[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
    assert torch.allclose(served, wanted, atol=1e-3)
    assert not torch.allclose(plain, wanted, atol=0.1)


def test_a_tied_embedding_is_lost_and_not_taken_for_a_linear_layer(tmp_path: Path) -> None:
    base = save_backbone("llama", tmp_path / "base")
    inner = of_rank(2)
    tuned = tuned_copy(base, tmp_path / "tuned", lambda name, w: w + 0.01 if "embed" in name else inner(name, w))
    difference = export(tmp_path, base, tuned, rank=2)
    assert [lost.parameter for lost in difference.lost] == ["model.embed_tokens.weight"]
    assert 0 < difference.lost_share < 1
    assert all("lm_head" not in layer.layer for layer in difference.layers)


def test_a_rank_beyond_the_matrix_is_filled_with_zeros() -> None:
    change = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    factor_a, factor_b = truncated_svd(change, 9)
    assert (factor_a.shape, factor_b.shape) == ((9, 4), (6, 9))
    assert torch.allclose(factor_b @ factor_a, change, atol=1e-6)
    assert not factor_a[4:].any()


def test_what_has_no_difference_is_refused(tmp_path: Path) -> None:
    base = save_backbone("llama", tmp_path / "base")
    with pytest.raises(DifferenceRefused, match="nothing to export"):
        export(tmp_path, base, base, rank=2)
    wide = save_backbone("llama", tmp_path / "wide", intermediate_size=128)
    with pytest.raises(DifferenceRefused, match=r"down_proj.weight: \[64, 96\] and \[64, 128\]"):
        export(tmp_path, base, wide, rank=2)
    broken = tuned_copy(base, tmp_path / "broken", lambda name, w: w * float("nan") if "layers.1.mlp" in name else w)
    with pytest.raises(
        DifferenceRefused, match=r"broken': model.layers.1.mlp.\w+.weight holds values that are no finite"
    ):
        export(tmp_path, base, broken, rank=2)
    assert not (tmp_path / "out").exists()


def test_the_verb_prints_the_errors(tmp_path: Path) -> None:
    base = save_backbone("llama", tmp_path / "base")
    tuned = tuned_copy(base, tmp_path / "tuned", of_rank(4))
    arguments = ["difference", str(base), str(tuned), "--rank", "2", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "relative error of the change, all linear layers together: " in done.output
    assert "model.layers.0.self_attn.q_proj (changed by" in done.output


@pytest.mark.parametrize(
    ("device", "said"), [("banana", "expected cpu, cuda"), ("cuda:99", "--device = cuda:99: here is")]
)
def test_a_device_that_is_not_there_is_named(tmp_path: Path, device: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        export_difference("base", "tuned", tmp_path / "out", rank=2, device=device)
    assert not list(tmp_path.iterdir())
