"""Activation checkpointing and the chunked loss change what is held and nothing else: each against the plain way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PrefixTuningConfig, get_peft_model
from pydantic import ValidationError
from test_trainer_loop import EXAMPLES, PAD, made
from torch import Tensor, nn
from transformers import Gemma2Config, GraniteConfig, T5Config, T5ForConditionalGeneration

import tiny
from polyhead_core.backbone import load_backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer import methods
from polyhead_trainer.activation_checkpointing import activation_checkpointing
from polyhead_trainer.batching import collate
from polyhead_trainer.compiled_layers import compiled_layers
from polyhead_trainer.config import FullSettings, LoraSettings, TrainingSection
from polyhead_trainer.decoder_layers import transformer_layers
from polyhead_trainer.loop import accumulate_gradients
from polyhead_trainer.objectives import CompletionObjective
from polyhead_trainer.objectives.chunked_loss import chunk_rows, chunked_loss_sum
from polyhead_trainer.objectives.label_logits import label_logits

OBJECTIVE = CompletionObjective(PAD)
ALL_BUT_FIRST = LoraSettings(rank=4, dropout=0.2, layers=[1, 2])


def tuned_model(
    folder: Path, kind: str = "llama", quantization: str = "none", adapter: Any = None, **changes: Any
) -> nn.Module:
    directory = tiny.save_backbone(kind, folder / "backbone", **changes)
    backbone = load_backbone(str(directory), quantization=quantization, cache_dir=folder / "cache", calibrate=False)
    model = methods.tune(backbone, adapter or LoraSettings(rank=4, dropout=0.2), seed=0).model.train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, and then A would have no gradient
            nn.init.normal_(parameter, std=0.1)
    return model


def section(**values: Any) -> TrainingSection:
    return TrainingSection.model_validate({"max_steps": 1, **values})


def loss_and_gradients(model: nn.Module, objective: CompletionObjective = OBJECTIVE) -> tuple[float, dict[str, Tensor]]:
    """Of two micro-batches, with the same dropout every time."""
    torch.manual_seed(7)
    model.zero_grad()
    loss = accumulate_gradients(model, objective, EXAMPLES, 4)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal_bits(model: nn.Module, training: TrainingSection) -> None:
    names = [name for name, _ in model.named_parameters()]
    plain_loss, plain = loss_and_gradients(model)
    with activation_checkpointing(model, training):
        assert [name for name, _ in model.named_parameters()] == names
        loss, gradients = loss_and_gradients(model)
    assert loss == plain_loss
    assert gradients.keys() == plain.keys()
    assert any(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain[name]), name


@pytest.mark.parametrize("how", ["all", "selective"])
@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_checkpointed_gradients_have_the_same_bits_dropout_included(
    tmp_path: Path, quantization: str, how: str
) -> None:
    check_equal_bits(tuned_model(tmp_path, quantization=quantization), section(activation_checkpointing=how))


@pytest.mark.parametrize("kind", ["gemma", "gpt_neox", "phi"])
def test_other_trees_are_checkpointed_as_well(tmp_path: Path, kind: str) -> None:
    check_equal_bits(tuned_model(tmp_path, kind), section(activation_checkpointing="all"))


def test_layers_below_the_first_adapter_and_every_second_layer(tmp_path: Path) -> None:
    model = tuned_model(tmp_path, adapter=ALL_BUT_FIRST)
    check_equal_bits(model, section(activation_checkpointing="all", activation_checkpointing_every=2))


def test_full_fine_tuning_is_checkpointed(tmp_path: Path) -> None:
    check_equal_bits(
        tuned_model(tmp_path, adapter=FullSettings(method="full")), section(activation_checkpointing="all")
    )


@pytest.mark.parametrize("how", ["all", "selective"])
def test_a_learned_prefix_survives_the_second_computation(tmp_path: Path, how: str) -> None:
    """The layers append to the cache that holds the prefix: computed twice, they must not append twice."""
    model = tiny.reference_model(tiny.save_backbone("llama", tmp_path / "backbone"))
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    wrapped = get_peft_model(model, config).train()
    ids = torch.tensor([EXAMPLES[1].token_ids])

    def gradient() -> Tensor:
        wrapped.zero_grad()
        wrapped(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        (found,) = [p.grad.clone() for p in wrapped.parameters() if p.grad is not None]
        return found

    plain = gradient()
    with activation_checkpointing(wrapped, section(activation_checkpointing=how)):
        assert torch.equal(gradient(), plain)
    assert plain.abs().max() > 0


def saved_bytes(compute: Callable[[], Tensor]) -> int:
    """Of the tensors that autograd keeps for backward."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(storages.values())


def test_what_is_checkpointed_is_what_is_not_kept(tmp_path: Path) -> None:
    """torch's checkpoint puts hooks of its own inside of ours, so what it drops is never seen by ours."""
    model = tuned_model(tmp_path, num_hidden_layers=8)
    batch = collate(made([(30, 30)] * 4), PAD)

    def kept(**values: Any) -> int:
        with activation_checkpointing(model, section(**values)):
            return saved_bytes(lambda: label_logits(model, batch).sum())

    plain, half, whole = (
        kept(),
        kept(activation_checkpointing="all", activation_checkpointing_every=2),
        kept(activation_checkpointing="all"),
    )
    assert whole < 0.4 * plain
    assert whole < half < 0.75 * plain


def test_evaluation_and_the_model_after_training_are_untouched(tmp_path: Path) -> None:
    model = tuned_model(tmp_path)
    layers = transformer_layers(model)
    with activation_checkpointing(model, section(activation_checkpointing="all")):
        assert all("forward" in layer.__dict__ for layer in layers)
    assert not any("forward" in layer.__dict__ for layer in layers)


@pytest.mark.parametrize("kind", sorted(tiny.CONFIGS))
def test_layers_are_found_in_every_tree_with_and_without_an_adapter(tmp_path: Path, kind: str) -> None:
    model = tiny.reference_model(tiny.save_backbone(kind, tmp_path / kind))
    assert len(transformer_layers(model)) == 3
    adapted = tuned_model(tmp_path / "adapted", kind)
    assert list(map(type, transformer_layers(adapted))) == list(map(type, transformer_layers(model)))


def test_an_encoder_decoder_has_two_stacks() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_decoder_layers=3, num_heads=2)
    assert len(transformer_layers(T5ForConditionalGeneration(config))) == 5


def test_a_model_without_layers_is_refused_by_the_settings_name() -> None:
    with (
        pytest.raises(ConfigError, match=r"training\.activation_checkpointing = all: Linear has no list"),
        activation_checkpointing(nn.Linear(2, 2), section(activation_checkpointing="all")),
    ):
        pass


@pytest.fixture(scope="module")
def chunk_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, nn.Module]:
    """By what is special about the head: an adapter on it, trained itself and tied, int8 below an adapter."""
    on_head = LoraSettings(rank=4, target_modules=["q_proj", "lm_head"])

    def model(name: str, **how: Any) -> nn.Module:
        return tuned_model(tmp_path_factory.mktemp(name), **how)

    return {
        "plain": model("plain"),
        "adapter-on-head": model("head", adapter=on_head),
        "adapter-on-int8-head": model("int8", adapter=on_head, quantization="int8"),
        "tied-and-trained": model("full", adapter=FullSettings(method="full")),
        "gpt_neox": model("neox", kind="gpt_neox"),
    }


def check_chunked(model: nn.Module, lengths: list[tuple[int, int]], rows: int) -> None:
    examples = made(lengths)
    batch = collate(examples, PAD)

    def results(loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        (loss / 3).backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain_loss, plain = results(F.cross_entropy(label_logits(model, batch), batch.targets_N, reduction="sum"))
    loss, gradients = results(chunked_loss_sum(model, batch, rows))
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == plain.keys()
    for name, gradient in gradients.items():
        scale = plain[name].abs().max().item()
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(chunked_loss_sum(model, batch, rows), plain_loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "adapter-on-head", "adapter-on-int8-head", "tied-and-trained", "gpt_neox"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    rows=st.integers(1, 12),
)
def test_chunks_give_the_loss_and_gradients_of_the_full_logits(
    chunk_models: dict[str, nn.Module], name: str, lengths: list[tuple[int, int]], rows: int
) -> None:
    model = chunk_models[name].eval()  # without dropout, whose draws depend on the shapes
    check_chunked(model, lengths, rows)


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_what_a_model_does_to_its_logits_is_done_to_chunks(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 2 caps them, Granite scales them, both after the head."""
    shape = tiny._GROUPED
    config = {
        "gemma2": Gemma2Config(**shape, head_dim=16, final_logit_softcapping=5.0),
        "granite": GraniteConfig(**shape, logits_scaling=3.0),
    }[kind]
    monkeypatch.setitem(tiny.CONFIGS, kind, config)
    check_chunked(tuned_model(tmp_path, kind, adapter=LoraSettings(rank=4)).eval(), [(3, 7), (5, 2), (1, 9)], 4)


def test_chunks_are_used_beyond_the_limit_alone() -> None:
    assert chunk_rows(0, 10**6, 10**6) is None
    assert chunk_rows(1000, 10, 100) is None
    assert chunk_rows(1000, 11, 100) == 10
    assert chunk_rows(50, 11, 100) == 1


def test_the_objective_chunks_as_the_setting_says(tmp_path: Path) -> None:
    model = tuned_model(tmp_path, adapter=LoraSettings(rank=4))
    plain_loss, plain = loss_and_gradients(model)
    chunked = CompletionObjective(PAD, logit_chunk=3 * tiny.VOCAB)
    shapes: list[int] = []
    handle = model.get_base_model().lm_head.register_forward_hook(lambda *given: shapes.append(given[2].shape[-2]))
    loss, gradients = loss_and_gradients(model, chunked)
    handle.remove()
    assert shapes.count(3) > 1
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-3, atol=1e-6)


def peak_allocated(compute: Callable[[], object]) -> int:
    """Most bytes allocated at once by `compute` on the CPU, as torch's allocator tells its profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        compute()
    total = peak = 0
    for event in measured.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def test_chunks_hold_a_fraction_of_the_full_logits(tmp_path: Path) -> None:
    """2,000 labels over 8,192 tokens: 66 MB of logits, several times over in the plain loss."""
    model = tuned_model(tmp_path, adapter=LoraSettings(rank=2), vocab_size=8192)
    batch = collate(made([(1, 251)] * 8), PAD)
    full = 2008 * 8192 * 4

    def plain() -> None:
        F.cross_entropy(label_logits(model, batch), batch.targets_N, reduction="sum").backward()

    plain_peak = peak_allocated(plain)
    peak = peak_allocated(lambda: chunked_loss_sum(model, batch, 64).backward())
    print(f"peak {plain_peak:,} bytes with full logits of {full:,}, {peak:,} in chunks")
    assert plain_peak > 2 * full
    assert peak < 0.4 * plain_peak


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("checkpointing", ["none", "all"])
def test_compiled_layers_give_the_same_gradients_up_to_rounding(
    tmp_path: Path, quantization: str, checkpointing: str
) -> None:
    model = tuned_model(tmp_path, quantization=quantization, adapter=LoraSettings(rank=4))
    expected_loss, expected = loss_and_gradients(model)
    settings = section(compile=True, activation_checkpointing=checkpointing)
    with compiled_layers(model, settings), activation_checkpointing(model, settings):
        loss, found = loss_and_gradients(model)
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-2, atol=2e-3)
    assert all("forward" not in layer.__dict__ for layer in transformer_layers(model))


def test_compiling_refuses_what_it_would_hide(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="selective"):
        section(compile=True, activation_checkpointing="selective")
    with (
        pytest.raises(ConfigError, match=r"training\.compile.*no list of layers"),
        compiled_layers(nn.Linear(2, 2), section(compile=True)),
    ):
        pass
