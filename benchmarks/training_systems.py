"""The systems that `training.py` compares: each trains the same LoRA on the same examples, one optimizer step a batch.

Every `train_*` takes a Work, trains and returns the adapted model with a Meter that knows each step's time and tokens.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from serving_workload import TARGETS
from torch import nn
from training_work import Work
from transformers import (
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from polyhead_trainer import methods
from polyhead_trainer.config import LoraSettings, TrainingSection
from polyhead_trainer.data import EncodedExample
from polyhead_trainer.loop import StepReport, TrainingLoop
from polyhead_trainer.objectives import CompletionObjective
from polyhead_trainer.packing import prepare_packing

RANK, ALPHA, LEARNING_RATE, MAX_GRAD_NORM = 8, 16, 3e-4, 1.0


@dataclass
class Meter:
    """Seconds and tokens of every step; tokens are those of the examples, without padding."""

    ends_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def step_done(self) -> None:
        self.ends_s.append(time.perf_counter())

    def tokens_per_s(self, skip: int) -> float:
        """After the first `skip` steps, which compile, allocate and warm up."""
        num_steps = len(self.ends_s)
        return sum(self.tokens[skip:num_steps]) / (self.ends_s[-1] - self.ends_s[skip - 1])


Trained = tuple[nn.Module, Meter]


def train_polyhead(work: Work, *, quantization: str, dtype: str, compiled: bool = False) -> Trained:
    backbone = work.backbone(quantization, dtype)
    tuned = methods.tune(backbone, LoraSettings(rank=RANK, alpha=ALPHA), work.seed)
    settings = TrainingSection(
        max_steps=work.num_steps,
        batch_size=work.batch_size,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        warmup=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        packing=True,
        compile=compiled,
        seed=work.seed,
    )
    prepare_packing(tuned.model, work.examples, work.pad_id)
    objective = CompletionObjective(work.pad_id, settings.logit_chunk, packing=True)
    meter = Meter()

    class Watch:
        def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
            meter.tokens.append(report.num_tokens)
            meter.step_done()

    TrainingLoop(tuned, objective, work.examples, settings).run([Watch()])
    return tuned.model, meter


def train_transformers(work: Work, *, dtype: str) -> Trained:
    """`Trainer` with peft, told not to shuffle."""
    model, meter = _peft_model(work, dtype), Meter()
    collate = DataCollatorForSeq2Seq(work.tokenizer, padding=True)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**_arguments(work), train_sampling_strategy="sequential"),
        train_dataset=_rows([example for batch in work.batches for example in batch]),
        data_collator=_counting(collate, meter),
        callbacks=[_StepClock(meter)],
    )
    trainer.train()
    return model, meter


def train_trl(work: Work, *, dtype: str) -> Trained:
    """`SFTTrainer` with its packing: rows of up to `batch_size` average examples, one of them a step."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, meter = _peft_model(work, dtype), Meter()
    rows = [
        {"input_ids": item.token_ids, "completion_mask": [int(label) for label in item.is_label]}
        for item in work.examples
    ]
    length = sum(map(len, work.examples)) // work.num_steps
    # Rows are filled as far as examples fit, so that there may be one or two more of them than steps elsewhere.
    arguments = {**_arguments(work), "per_device_train_batch_size": 1, "max_steps": -1, "num_train_epochs": 1}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments, packing=True, max_length=length, completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=work.tokenizer,
        callbacks=[_StepClock(meter)],
    )
    trainer.data_collator = _counting(trainer.data_collator, meter)
    trainer.train()
    return model, meter


def train_cookbook(work: Work, *, dtype: str) -> Trained:
    """The loop of llama-cookbook's train_utils: padded batches, `model(**batch).loss`, clip, step."""
    model, meter = _peft_model(work, dtype), Meter()
    collate = _counting(DataCollatorForSeq2Seq(work.tokenizer, padding=True), meter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    for examples in work.batches:
        batch = {name: tensor.to(work.device) for name, tensor in collate(_rows(examples)).items()}
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        loss.detach().float().item()
        meter.step_done()
    return model, meter


def _peft_model(work: Work, dtype: str) -> nn.Module:
    model = work.model(dtype)
    torch.manual_seed(work.seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _rows(examples: Sequence[EncodedExample]) -> list[dict[str, list[int]]]:
    return [
        {
            "input_ids": item.token_ids,
            "attention_mask": [1] * len(item),
            "labels": [t if label else -100 for t, label in zip(item.token_ids, item.is_label, strict=True)],
        }
        for item in examples
    ]


def _arguments(work: Work) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(prefix="polyhead-bench-training-"),
        "max_steps": work.num_steps,
        "per_device_train_batch_size": work.batch_size,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_GRAD_NORM,
        "optim": "adamw_torch",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10**9,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": work.device == "cpu",
        "seed": work.seed,
    }


def _counting(collate: Callable[[Any], Any], meter: Meter) -> Callable[[Any], Any]:
    def counted(rows: Any) -> Any:
        meter.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return collate(rows)

    return counted


class _StepClock(TrainerCallback):  # type: ignore[misc]
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._meter.step_done()


SYSTEMS: dict[str, Callable[[Work], Trained]] = {
    "polyhead int8": lambda work: train_polyhead(work, quantization="int8", dtype="auto"),
    "polyhead int8 bfloat16": lambda work: train_polyhead(work, quantization="int8", dtype="bfloat16"),
    "polyhead compiled int8": lambda work: train_polyhead(work, quantization="int8", dtype="auto", compiled=True),
    "polyhead float32": lambda work: train_polyhead(work, quantization="none", dtype="float32"),
    "polyhead compiled float32": lambda work: train_polyhead(work, quantization="none", dtype="float32", compiled=True),
    "polyhead bfloat16": lambda work: train_polyhead(work, quantization="none", dtype="bfloat16"),
    "polyhead compiled bfloat16": lambda work: train_polyhead(
        work, quantization="none", dtype="bfloat16", compiled=True
    ),
    "transformers Trainer float32": lambda work: train_transformers(work, dtype="float32"),
    "transformers Trainer bfloat16": lambda work: train_transformers(work, dtype="bfloat16"),
    "TRL SFTTrainer packed float32": lambda work: train_trl(work, dtype="float32"),
    "TRL SFTTrainer packed bfloat16": lambda work: train_trl(work, dtype="bfloat16"),
    "llama-cookbook loop float32": lambda work: train_cookbook(work, dtype="float32"),
    "llama-cookbook loop bfloat16": lambda work: train_cookbook(work, dtype="bfloat16"),
}
