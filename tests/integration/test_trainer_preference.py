"""DPO of an adapter: the loss against a slow one from full logits, exact accumulation, and a run that learns."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from polyhead_core.backbone import load_backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer import methods
from polyhead_trainer.config import RunConfig, parse_config
from polyhead_trainer.data import load_examples
from polyhead_trainer.errors import DataError
from polyhead_trainer.loop import accumulate_gradients
from polyhead_trainer.methods import Tuned, trained_parameters
from polyhead_trainer.objectives.preference import EncodedPair
from polyhead_trainer.reevaluate import measure, read_subject
from polyhead_trainer.run import run
from polyhead_trainer.tasks import Task, open_task
from tiny import VOCAB, save_backbone

BETA = 0.3
THINGS = ["grass", "snow", "coal", "blood", "sky", "lemon", "the sea", "ink"]


def configuration(folder: Path, *overrides: str) -> RunConfig:
    if not (folder / "backbone").exists():
        save_backbone("llama", folder / "backbone")
        pairs = [
            {"prompt": f"{number}. What of {thing}? ", "chosen": "I like it well", "rejected": "no"}
            for number in range(4)
            for thing in THINGS
        ]
        lines = [json.dumps(pair) for pair in pairs]
        (folder / "train.jsonl").write_text("\n".join(lines[8:]))
        (folder / "held_out.jsonl").write_text("\n".join(lines[:8]))
    values = {
        "output": str(folder / "out"),
        "task": "preference",
        "backbone": {"source": str(folder / "backbone"), "cache_dir": str(folder / "cache")},
        "adapter": {"rank": 4, "dropout": 0.1},
        "preference": {"beta": BETA},
        "data": {"train": [str(folder / "train.jsonl")], "held_out": [str(folder / "held_out.jsonl")]},
        "training": {"max_steps": 8, "batch_size": 8, "learning_rate": 3e-3},
        "evaluate": {"generate_examples": 2, "max_new_tokens": 4, "choices": ["I like it well", "no"]},
    }
    return parse_config(values, "test", overrides)


def opened(config: RunConfig) -> tuple[Task, Tuned, list[EncodedPair]]:
    backbone = load_backbone(
        config.backbone.source, quantization=config.backbone.quantization, cache_dir=config.backbone.cache_dir
    )
    task = open_task(config, backbone)
    tuned = methods.tune(task.backbone, config.adapter, seed=0)
    examples = load_examples(config.data.train, backbone.tokenizer, 512, task.encode).examples
    return task, tuned, [pair for pair in examples if isinstance(pair, EncodedPair)]


def shake(tuned: Tuned) -> None:
    """A fresh LoRA adapter changes nothing, and every loss would be log 2."""
    torch.manual_seed(1)
    for parameter in trained_parameters(tuned.model).values():
        nn.init.normal_(parameter, std=0.2)


def slow_log_prob(model: nn.Module, token_ids: list[int], prompt_length: int) -> torch.Tensor:
    log_probs_TV = model(torch.tensor([token_ids])).logits[0].float().log_softmax(dim=-1)
    return sum((log_probs_TV[at - 1, token_ids[at]] for at in range(prompt_length, len(token_ids))), torch.zeros(()))


def slow_loss(tuned: Tuned, pair: EncodedPair) -> torch.Tensor:
    both = [(pair.token_ids, pair.prompt_length), (pair.rejected.token_ids, pair.rejected.prompt_length)]
    chosen, rejected = (slow_log_prob(tuned.model, *one) for one in both)
    with torch.no_grad(), tuned.baseline():
        chosen_reference, rejected_reference = (slow_log_prob(tuned.model, *one) for one in both)
    margin = BETA * ((chosen - chosen_reference) - (rejected - rejected_reference))
    return -torch.log(1 / (1 + torch.exp(-margin)))


def gradients(tuned: Tuned) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in trained_parameters(tuned.model).values()]
    tuned.model.zero_grad()
    return found


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_loss_and_gradients_equal_the_slow_computation(tmp_path: Path, quantization: str) -> None:
    config = configuration(tmp_path, f"backbone.quantization={quantization}")
    task, tuned, pairs = opened(config)
    shake(tuned)
    tuned.model.eval()
    pairs = pairs[:7]
    slow = torch.stack([slow_loss(tuned, pair) for pair in pairs]).mean()
    slow.backward()
    expected = gradients(tuned)
    assert abs(slow.item() - math.log(2)) > 0.01
    for size in (1, 3, len(pairs)):
        loss = accumulate_gradients(tuned.model, task.objective(tuned), pairs, size)
        assert loss == pytest.approx(slow.item(), rel=1e-4)
        for one, other in zip(gradients(tuned), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("adapter", ["{rank = 4}", '{method = "prefix_tuning"}'], ids=["lora", "prefix"])
def test_chunks_of_logits_give_the_same_loss_and_gradients(tmp_path: Path, adapter: str) -> None:
    how = ["backbone.quantization=none", f"adapter={adapter}", "preference.beta=0.01"]
    task, tuned, pairs = opened(configuration(tmp_path, *how))
    shake(tuned)
    plain = dataclasses.replace(task.objective(tuned), logit_chunk=0)
    expected = accumulate_gradients(tuned.model, plain, pairs[:4], 2)
    expected_gradients = gradients(tuned)
    sizes: list[int] = []
    head = task.backbone.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda *given: sizes.append(given[2].numel()))
    task = dataclasses.replace(task, config=configuration(tmp_path, *how, f"training.logit_chunk={3 * VOCAB}"))
    loss = accumulate_gradients(tuned.model, task.objective(tuned), pairs[:4], 2)
    handle.remove()
    assert max(sizes) == 3 * VOCAB
    assert loss == pytest.approx(expected, rel=1e-5)
    for one, other in zip(gradients(tuned), expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_run_in_chunks_of_logits_learns_and_measures_as_one_without(tmp_path: Path) -> None:
    records = []
    for chunk in (0, 3 * VOCAB):
        config = configuration(tmp_path, f"training.logit_chunk={chunk}", "backbone.quantization=none")
        records.append(run(config, Console(quiet=True), overwrite=True).record)
    plain, chunked = records
    assert [step.loss for step in chunked.curve] == pytest.approx([step.loss for step in plain.curve], rel=1e-3)
    assert chunked.after.held_out_loss == pytest.approx(plain.after.held_out_loss, rel=1e-3)
    assert chunked.before.reward_margin == pytest.approx(0, abs=1e-6)


def test_the_reference_sees_no_dropout_and_leaves_the_model_in_training(tmp_path: Path) -> None:
    task, tuned, pairs = opened(configuration(tmp_path, "backbone.quantization=none"))
    tuned.model.train()
    reference = task.objective(tuned)._reference
    first, second = (reference(tuned.model, pairs, torch.device("cpu")) for _ in range(2))
    assert torch.equal(first, second)
    assert tuned.model.training
    assert all(parameter.requires_grad for parameter in trained_parameters(tuned.model).values())
    expected = [slow_log_prob(tuned.model.base_model.model.eval(), pairs[0].token_ids, pairs[0].prompt_length)]
    torch.testing.assert_close(first[0, :1], torch.stack(expected).detach(), rtol=1e-4, atol=1e-4)


def test_a_run_learns_the_preference_and_comes_back_equal(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    result = run(config, Console(quiet=True))
    before, after = result.record.before, result.record.after
    assert (before.preference_accuracy, before.reward_margin) == (0.5, 0)
    assert before.held_out_loss == pytest.approx(math.log(2))
    assert result.record.curve[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert after.held_out_loss < 0.8 * before.held_out_loss
    assert after.preference_accuracy == 1
    assert after.reward_margin is not None
    assert after.reward_margin > 0.2
    again = measure(read_subject(config.output, []))
    assert (again.before, again.after) == (before, after)


def test_what_cannot_be_preferred_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compares the model with itself without its adapter"):
        configuration(tmp_path, 'adapter={method = "full"}')
    for bias in ("all", "lora_only"):
        with pytest.raises(ConfigError, match=f"adapter.bias = {bias} with task = preference.*set adapter.bias = none"):
            configuration(tmp_path, f"adapter.bias={bias}")
    config = configuration(tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a", "chosen": " b", "rejected": " b"}))
    with pytest.raises(DataError, match=r"train\.jsonl:1: chosen and rejected are the same text"):
        run(config, Console(quiet=True))
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a", "chosen": " b"}))
    with pytest.raises(DataError, match=r'"prompt" and "chosen" and "rejected"'):
        run(config, Console(quiet=True))


def test_a_pair_counts_with_both_completions(tmp_path: Path) -> None:
    _, _, pairs = opened(configuration(tmp_path))
    pair = pairs[0]
    prompt, chosen, rejected = len(pair.example.prompt), len("I like it well"), len("no")
    # One token a byte, and an end token after each completion.
    assert len(pair) == 2 * prompt + chosen + rejected + 2
    assert (pair.width, pair.num_labels) == (prompt + chosen + 1, chosen + rejected + 2)
