"""Classification: a head alone, with added layers, with LoRA: learns, moves what it should, and comes back equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from polyhead_core.adapter_directory import CONFIG_FILE, WEIGHTS_FILE, read_adapter_directory
from polyhead_core.backbone import Backbone, load_backbone
from polyhead_core.errors import AdapterFormatError, AdapterMismatch, ConfigError
from polyhead_trainer import methods
from polyhead_trainer.config import RunConfig, parse_config
from polyhead_trainer.data import load_examples
from polyhead_trainer.errors import DataError
from polyhead_trainer.heads import load_head
from polyhead_trainer.loop import accumulate_gradients
from polyhead_trainer.reevaluate import measure, read_subject
from polyhead_trainer.run import RunResult, run
from polyhead_trainer.scores import macro_f1
from polyhead_trainer.tasks import open_task
from polyhead_trainer.tasks.classification import label_scores
from tiny import save_backbone

TEXTS = {
    "good": ["what a lovely day", "this is great", "i love it so much", "wonderful news", "so happy"],
    "bad": ["how awful", "i hate this", "terrible, just terrible", "sad and angry"],
    "flat": ["the train leaves at noon", "a chair has four legs", "two and two"],
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "head": {"method": "head"},
    "added layers": {"method": "head", "hidden": [24, 16]},
    "lora": {"method": "lora", "rank": 4},
}


def configuration(folder: Path, adapter: dict[str, Any], *overrides: str, kind: str = "llama") -> RunConfig:
    if not (folder / "backbone").exists():
        save_backbone(kind, folder / "backbone")
        texts = [
            (f"{mark}{text}", label) for mark in ("1. ", "2. ", "") for label, all_ in TEXTS.items() for text in all_
        ]
        for side, chosen in (("train", texts[8:]), ("held_out", texts[:8])):
            lines = [json.dumps({"text": text, "label": label}) for text, label in chosen]
            (folder / f"{side}.jsonl").write_text("\n".join(lines))
    values = {
        "output": str(folder / "out"),
        "task": "classification",
        "backbone": {"source": str(folder / "backbone"), "cache_dir": str(folder / "cache")},
        "adapter": adapter,
        "data": {"train": [str(folder / "train.jsonl")], "held_out": [str(folder / "held_out.jsonl")]},
        "training": {"max_steps": 24, "batch_size": 16, "learning_rate": 1e-2, "schedule": "constant"},
    }
    return parse_config(values, "test", overrides)


def run_quietly(config: RunConfig) -> RunResult:
    return run(config, Console(quiet=True))


def backbone_of(config: RunConfig) -> Backbone:
    settings = config.backbone
    return load_backbone(settings.source, quantization=settings.quantization, cache_dir=settings.cache_dir)


def logits(model: torch.nn.Module, texts: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in texts])


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_classifier_learns_and_comes_back_equal(tmp_path: Path, name: str) -> None:
    config = configuration(tmp_path, ADAPTERS[name])
    result = run_quietly(config)
    before, after = result.record.before, result.record.after
    # A head of zeros names the commonest label, and is equally unsure of all.
    assert before.held_out_loss == pytest.approx(torch.tensor(3.0).log().item())
    assert before.accuracy == 5 / 8
    assert after.held_out_loss < before.held_out_loss
    assert result.record.curve[-1].loss < 0.8 * result.record.curve[0].loss
    assert len(after.answers) == 8
    assert {*after.answers} <= {*TEXTS}
    again = measure(read_subject(config.output, []))
    assert (again.before, again.after) == (before, after)
    (tmp_path / "train.jsonl").unlink()
    assert measure(read_subject(config.output, [])).after == after, "the output alone must be enough"
    files = read_adapter_directory(config.output)
    assert files.backbone_fingerprint == result.record.backbone.fingerprint
    assert files.quantization == "int8"
    shared = result.record.backbone.num_parameters
    assert shared < result.record.trainable.num_total < shared + 2 * result.record.trainable.num_trainable + 500


@pytest.mark.parametrize("name", ["head", "added layers"])
def test_only_the_head_moves(tmp_path: Path, name: str) -> None:
    config = configuration(tmp_path, ADAPTERS[name])
    task = open_task(config, backbone_of(config))
    tuned = methods.tune(task.backbone, config.adapter, seed=0)
    examples = load_examples(config.data.train, task.backbone.tokenizer, 512, task.encode).examples
    # A score of zeros hands no gradient on to the layers before it.
    tuned.model.score.weight.data.normal_()
    accumulate_gradients(tuned.model, task.objective(tuned), examples, 4)
    moved = {name for name, parameter in tuned.model.named_parameters() if parameter.grad is not None}
    dense = {f"score.dense.{n}.{kind}" for n in (0, 1) for kind in ("weight", "bias")} if name != "head" else set()
    assert moved == {"score.weight", *dense}
    assert all(tuned.model.get_parameter(name).grad.abs().max() > 0 for name in moved)


def test_the_loss_is_that_of_each_text_alone(tmp_path: Path) -> None:
    """Whatever the padding: against transformers' classifier on one text at a time, mean over texts and not tokens."""
    config = configuration(tmp_path, ADAPTERS["lora"], "backbone.quantization=none")
    task = open_task(config, backbone_of(config))
    tuned = methods.tune(task.backbone, config.adapter, seed=0)
    torch.nn.init.normal_(tuned.model.base_model.model.score.modules_to_save["default"].weight)
    examples = load_examples(config.data.train, task.backbone.tokenizer, 512, task.encode).examples
    wanted = torch.tensor([["good", "bad", "flat"].index(item.example.reference) for item in examples])
    slow = F.cross_entropy(logits(tuned.model, [item.token_ids for item in examples]), wanted)
    for size in (1, 5, len(examples)):
        loss = accumulate_gradients(tuned.model, task.objective(tuned), examples, size)
        assert loss == pytest.approx(slow.item(), rel=1e-5)


ACCEPTED: dict[str, dict[str, Any]] = {
    **ADAPTERS,
    "dora": {"method": "lora", "rank": 4, "use_dora": True},
    "ia3": {"method": "ia3"},
    "ln_tuning": {"method": "ln_tuning"},
    "bottleneck": {"method": "bottleneck", "size": 8},
    "full": {"method": "full"},
    "last layers": {"method": "full", "last_layers": 1},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_accepted_method_learns_its_scores_whatever_shares_a_batch(tmp_path: Path, name: str) -> None:
    config = configuration(tmp_path, ACCEPTED[name], "training.max_steps=16", "backbone.quantization=none")
    curve = run_quietly(config).record.curve
    assert curve[-1].loss < 0.8 * curve[0].loss
    task = open_task(config, backbone_of(config))
    tuned = task.reload(config.output).eval()
    examples = load_examples(config.data.train, task.backbone.tokenizer, 512, task.encode).examples
    assert len({len(example) for example in examples}) > 1, "without padding this shows nothing"
    scores_BL = label_scores(tuned, examples, task.pad_id, "cpu").detach()
    assert scores_BL.abs().max() > 0.1, "the head is untrained"
    alone_BL = torch.cat([label_scores(tuned, [example], task.pad_id, "cpu").detach() for example in examples])
    torch.testing.assert_close(scores_BL, alone_BL, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"method": "prompt_tuning"}, "prompt_tuning with task = classification: peft cannot switch virtual tokens"),
        ({"method": "p_tuning"}, "p_tuning with task = classification: peft cannot switch virtual tokens"),
        ({"method": "prefix_tuning"}, "prefix_tuning with task = classification: peft cannot switch virtual tokens"),
        ({"method": "llama_adapter"}, "neither trains nor saves the classifier's scores.*choose lora, ia3"),
        ({"method": "lora", "init": "pissa"}, "adapter.init = pissa with task = classification.*init = default"),
        ({"method": "lora", "init": "olora"}, "adapter.init = olora with task = classification.*init = default"),
    ],
)
def test_methods_that_would_not_learn_to_classify_are_refused(
    tmp_path: Path, adapter: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration(tmp_path, adapter)


def test_lora_with_a_head_is_read_by_transformers_and_stock_peft(tmp_path: Path) -> None:
    config = configuration(tmp_path, ADAPTERS["lora"], "backbone.quantization=none")
    run_quietly(config)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "backbone", num_labels=3)
    stock = PeftModel.from_pretrained(base, config.output).eval()
    task = open_task(config, backbone_of(config))
    texts = [[70, 71, 72], [90, 91, 92, 93, 94]]
    torch.testing.assert_close(logits(stock, texts), logits(task.reload(config.output), texts))
    assert [name for name in load_file(config.output / WEIGHTS_FILE) if "score" in name] == [
        "base_model.model.score.weight"
    ]


def test_a_heads_directory_holds_two_small_files(tmp_path: Path) -> None:
    config = configuration(tmp_path, ADAPTERS["added layers"])
    run_quietly(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(config.output / WEIGHTS_FILE).items()}
    assert shapes == {
        "score.dense.0.weight": (24, 64),
        "score.dense.0.bias": (24,),
        "score.dense.1.weight": (16, 24),
        "score.dense.1.bias": (16,),
        "score.weight": (3, 16),
    }
    settings = json.loads((config.output / CONFIG_FILE).read_text())
    assert settings["labels"] == ["good", "bad", "flat"]
    assert (settings["peft_type"], settings["task_type"], settings["hidden"]) == ("HEAD", "SEQ_CLS", [24, 16])


def test_a_damaged_or_foreign_head_is_refused(tmp_path: Path) -> None:
    config = configuration(tmp_path, ADAPTERS["head"])
    run_quietly(config)
    other = load_backbone(str(save_backbone("llama", tmp_path / "other", seed=1)), cache_dir=tmp_path / "cache")
    with pytest.raises(AdapterMismatch, match="fingerprint"):
        load_head(other, config.output)
    save_file({"score.weight": torch.zeros(3, 65)}, config.output / WEIGHTS_FILE)
    with pytest.raises(AdapterMismatch, match=r"\(3, 64\).*\(3, 65\)"):
        load_head(backbone_of(config), config.output)
    (config.output / CONFIG_FILE).write_text('{"peft_type": "HEAD", "labels": "good"}')
    with pytest.raises(AdapterFormatError, match="lists `labels` and `hidden`"):
        load_head(backbone_of(config), config.output)


@pytest.mark.parametrize("kind", ["gpt_neox", "phi", "qwen3"])
def test_other_architectures_have_heads_too(tmp_path: Path, kind: str) -> None:
    config = configuration(tmp_path, ADAPTERS["head"], "training.max_steps=2", kind=kind)
    result = run_quietly(config)
    again = measure(read_subject(config.output, []))
    assert again.after == result.record.after
    assert again.after.held_out_loss != again.before.held_out_loss


def test_what_does_not_fit_the_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set task = classification, not completion"):
        configuration(tmp_path, ADAPTERS["head"], "task=completion")
    with pytest.raises(ConfigError, match=r"evaluate\.general_text and evaluate\.earlier measure a language model"):
        configuration(tmp_path, ADAPTERS["head"], 'evaluate.general_text="x.txt"')
    with pytest.raises(DataError, match=r"held_out\.jsonl:\d+: label 'bad': expected one of flat, good"):
        run_quietly(configuration(tmp_path, ADAPTERS["head"], 'data.labels=["flat", "good"]'))
    with pytest.raises(DataError, match=r"jsonl:1: a record for classification, where the task expects completion"):
        run_quietly(configuration(tmp_path, ADAPTERS["lora"], "task=completion"))


def test_macro_f1_is_the_mean_over_labels() -> None:
    found, wanted = ["a", "a", "b", "c"], ["a", "b", "b", "b"]
    # a: precision 1/2, recall 1; b: precision 1, recall 1/3; c: never there.
    assert macro_f1(found, wanted) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
