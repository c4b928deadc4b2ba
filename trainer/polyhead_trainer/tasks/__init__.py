"""What is learned: the form of the data, the model's output, the loss and the measures. One module per task."""

from __future__ import annotations

from collections.abc import Callable

from polyhead_core.backbone import Backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer.config import RunConfig
from polyhead_trainer.tasks.classification import classification
from polyhead_trainer.tasks.completion import completion
from polyhead_trainer.tasks.preference import preference
from polyhead_trainer.tasks.seq2seq import seq2seq
from polyhead_trainer.tasks.task import Evaluator, Task

__all__ = ["TASKS", "Evaluator", "Task", "open_task"]

TASKS: dict[str, Callable[[RunConfig, Backbone], Task]] = {
    "completion": completion,
    "classification": classification,
    "preference": preference,
    "seq2seq": seq2seq,
}


def open_task(config: RunConfig, backbone: Backbone) -> Task:
    """The task of a run on a backbone that no method has touched yet. Raises ConfigError, DataError."""
    if backbone.model.config.is_encoder_decoder and config.task != "seq2seq":
        raise ConfigError(f"task = {config.task}: {backbone.source!r} is an encoder-decoder: set task = seq2seq")
    return TASKS[config.task](config, backbone)
