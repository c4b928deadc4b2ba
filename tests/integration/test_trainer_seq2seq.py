"""LoRA on encoder-decoders: the loss is transformers' own, a run learns and comes back, and mt0's counts are PEFT's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_trainer_run import configuration, run_quietly, write_data
from transformers import AutoModelForSeq2SeqLM, MT5Config

from encoder_decoders import make_encoder_decoder, save_encoder_decoder
from polyhead_core.backbone import Backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer import backbones, methods, scores
from polyhead_trainer.config import LoraSettings, RunConfig
from polyhead_trainer.data import load_examples
from polyhead_trainer.loop import accumulate_gradients
from polyhead_trainer.record import count_parameters
from polyhead_trainer.reevaluate import measure, read_subject
from polyhead_trainer.tasks import open_task
from polyhead_trainer.tasks.seq2seq import Seq2SeqObjective, Seq2SeqTask
from tiny import VOCAB


def seq2seq_configuration(folder: Path, *overrides: str) -> RunConfig:
    if not (folder / "encoder_decoder").exists():
        write_data(folder)
        save_encoder_decoder(folder / "encoder_decoder", dropout_rate=0.1)
    plain = ("task=seq2seq", "backbone.quantization=none", 'adapter={target_modules = ["q", "v"], rank = 4}')
    evaluation = "evaluate={generate_examples = 3, max_new_tokens = 4}"
    return configuration(folder, *plain, evaluation, *overrides, backbone=str(folder / "encoder_decoder"))


def test_the_loss_is_transformers_own_summed(tmp_path: Path) -> None:
    config = seq2seq_configuration(tmp_path)
    backbone = backbones.load(config.backbone)
    task = open_task(config, backbone)
    examples = load_examples(config.data.train, backbone.tokenizer, 512, task.encode).examples[:5]
    tuned = methods.tune(backbone, config.adapter, 0)
    tuned.model.eval()
    expected = torch.zeros(())
    for item in examples:
        prompt, labels = torch.tensor([item.token_ids]).split([item.prompt_length, item.num_labels], dim=1)
        expected += tuned.model(input_ids=prompt, labels=labels).loss * item.num_labels
    found = task.objective(tuned).loss_sum(tuned.model, examples, torch.device("cpu"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert task.objective(tuned).num_units(examples) == sum(item.num_labels for item in examples)


@pytest.mark.parametrize("kind", ["t5", "t5-own-head", "bart", "lora"])
def test_chunks_of_logits_give_the_same_loss_and_gradients(tmp_path: Path, kind: str) -> None:
    """BART's logits get a bias behind the head."""
    model = make_encoder_decoder("t5" if kind == "lora" else kind)
    if kind == "lora":
        lora = LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "lm_head"], init_lora_weights=False)
        model = get_peft_model(model, lora)
    config = seq2seq_configuration(tmp_path)
    backbone = backbones.load(config.backbone)
    examples = load_examples(config.data.train, backbone.tokenizer, 512, open_task(config, backbone).encode).examples[
        :5
    ]

    def results(logit_chunk: int) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        objective = Seq2SeqObjective(pad_id=0, logit_chunk=logit_chunk)
        loss = accumulate_gradients(model, objective, examples, 5)
        return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, gradients = results(0)
    sizes: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *given: sizes.append(given[2].numel()))
    chunked_loss, chunked = results(3 * VOCAB)
    handle.remove()
    assert max(sizes) == 3 * VOCAB
    assert chunked_loss == pytest.approx(loss, rel=1e-5)
    assert chunked.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_the_setting_reaches_the_objective(tmp_path: Path) -> None:
    config = seq2seq_configuration(tmp_path, "training.logit_chunk=99", "evaluate.batch_size=2")
    task = open_task(config, backbones.load(config.backbone))
    assert isinstance(task, Seq2SeqTask)
    tuned = methods.tune(task.backbone, config.adapter, 0)
    assert task.objective(tuned).logit_chunk == 99
    assert (task.evaluator([]).batch_size, task.evaluator([]).objective.logit_chunk) == (2, 99)


@pytest.mark.parametrize(
    "adapter", ['{target_modules = ["q", "v"], rank = 4}', '{method = "ia3"}', '{method = "full"}'], ids=str
)
def test_a_run_learns_and_comes_back_equal(tmp_path: Path, adapter: str) -> None:
    config = seq2seq_configuration(tmp_path, f"adapter={adapter}", "training.learning_rate=1e-2")
    result = run_quietly(config)
    assert result.record.after.held_out_loss < result.record.before.held_out_loss
    after = result.record.after
    assert (after.rouge_1, after.rouge_2, after.rouge_l) == scores.rouge(after.answers, result.record.references)
    again = measure(read_subject(config.output, []))
    assert again.before == result.record.before
    assert again.after.answers == result.record.after.answers
    assert again.after.held_out_loss == pytest.approx(result.record.after.held_out_loss, rel=1e-5)


@pytest.mark.parametrize("how", ["all", "selective"])
def test_activations_that_are_computed_again_are_the_same(tmp_path: Path, how: str) -> None:
    kept = run_quietly(seq2seq_configuration(tmp_path)).record.curve
    again = seq2seq_configuration(tmp_path, f"training.activation_checkpointing={how}", f"output={tmp_path}/again")
    found = run_quietly(again).record.curve
    assert [step.loss for step in found] == pytest.approx([step.loss for step in kept], rel=1e-5)
    assert [step.grad_norm for step in found] == pytest.approx([step.grad_norm for step in kept], rel=1e-4)


def test_stock_peft_loads_it(tmp_path: Path) -> None:
    config = seq2seq_configuration(tmp_path)
    run_quietly(config)
    stock = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(config.backbone.source), str(config.output))
    assert stock.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    assert count_parameters(stock) > count_parameters(stock.get_base_model().get_encoder())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone.quantization=int8"], "is made for decoder-only models"),
        (["task=completion"], "is an encoder-decoder: set task = seq2seq"),
        (['adapter={method = "prompt_tuning"}'], "works with adapter.method = lora, ia3 or full, not prompt_tuning"),
        (["evaluate.general_text=x.txt"], "has no evaluate.general_text"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_quietly(seq2seq_configuration(tmp_path, *overrides))


def test_a_decoder_is_no_encoder_decoder(tmp_path: Path) -> None:
    plain = "evaluate={generate_examples = 0}"
    with pytest.raises(ConfigError, match="needs an encoder-decoder"):
        run_quietly(configuration(tmp_path, "task=seq2seq", plain))


def test_mt0_large_has_the_counts_of_the_peft_introduction() -> None:
    """From the configuration alone, without weights: 2,359,296 trainable of 1,231,940,608 (0.19 %)."""
    config = MT5Config(vocab_size=250112, d_model=1024, d_ff=2816, d_kv=64, num_layers=24, num_heads=16)
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    backbone = Backbone(
        model=model.requires_grad_(False),
        tokenizer=None,
        source="bigscience/mt0-large",
        directory=Path(),
        fingerprint="",
        quantization="none",
        dtype=torch.float32,
        device=torch.device("meta"),
    )
    settings = LoraSettings(rank=8, alpha=32, dropout=0.1, target_modules=["q", "v"])
    tuned = methods.tune(backbone, settings, seed=0)
    trainable = sum(parameter.numel() for parameter in methods.trained_parameters(tuned.model).values())
    # transformers ties mT5's head to its embedding (seen in 5.17), whatever the configuration says; the introduction's
    # count is of a head beside it.
    head = model.get_output_embeddings().weight
    assert head is model.get_input_embeddings().weight
    assert (trainable, count_parameters(tuned.model) + head.numel()) == (2_359_296, 1_231_940_608)
