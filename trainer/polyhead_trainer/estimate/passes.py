"""What a run's passes over the model hold at their fullest moment: dry runs of its largest batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polyhead_core.int8 import Int8Linear
from polyhead_trainer.batching import collate
from polyhead_trainer.config import RunConfig
from polyhead_trainer.data import EncodedExample, Example
from polyhead_trainer.estimate.dry_run import DryRun, Held
from polyhead_trainer.evaluate import WINDOW_TOKENS, by_length
from polyhead_trainer.methods import Tuned
from polyhead_trainer.objectives import CompletionObjective, Objective
from polyhead_trainer.optimizers import make_optimizer

CPU = torch.device("cpu")
Pass = Callable[[], object]
"""Over a model of a dry run."""
OUTSIDE_TORCH = ("adamw-8bit", "paged-adamw-8bit")
"""Optimizers whose step is bitsandbytes' own, and makes nothing by the way."""


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Bytes beside the model and the optimizer's states."""

    step: Held
    """In forward and backward passes."""
    gradients: int
    """What the passes leave to the optimizer."""
    update: int
    """In the optimizer's step, gradients included."""
    evaluation: int


def find_peaks(
    dry: DryRun,
    parameters: Sequence[nn.Parameter],
    *,
    passes: Sequence[Pass],
    update: Pass,
    evaluations: Iterable[Pass],
    accumulates: bool,
) -> Peaks:
    """Of the costliest of `passes` and `evaluations`.

    `accumulates`: a pass may begin with the gradients of one before it.
    """
    step, gradients = Held(num_bytes=0, gradients=0), 0
    for run in [*passes[:1], *passes] if accumulates else passes:
        dry.restart()
        run()
        step = max(step, dry.peak, key=lambda held: held.num_bytes)
        gradients = max(gradients, dry.gradients)
        if not accumulates and run is not passes[-1]:
            _drop_gradients(parameters)
    before = dry.held - dry.gradients
    dry.restart()
    update()
    states = dry.held - dry.gradients - before
    in_update = dry.peak.num_bytes - states
    _drop_gradients(parameters)
    held, evaluation = dry.held, 0
    for run in evaluations:
        dry.restart()
        with torch.no_grad():
            run()
        evaluation = max(evaluation, dry.peak.num_bytes - held)
    return Peaks(step=step, gradients=gradients, update=in_update, evaluation=evaluation)


def _drop_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def optimizer_step(tuned: Tuned, config: RunConfig) -> Pass:
    settings = config.training
    if settings.optimizer in OUTSIDE_TORCH:
        return lambda: None
    return make_optimizer(tuned.parameter_groups(settings), settings).step


def evaluation_passes(
    config: RunConfig, model: nn.Module, objective: Objective, held_out: Sequence[EncodedExample], pad_id: int
) -> Iterator[Pass]:
    """As the task's evaluator makes them, of the batches that cost most."""
    settings = config.evaluate
    plain = CompletionObjective(pad_id)
    if config.task == "completion":
        objective = plain
    model.eval()
    for chunk in largest(by_length(held_out[: settings.max_examples or None], settings.batch_size)):
        yield partial(objective.loss_sum, model, chunk, CPU)
    if config.task in ("completion", "preference"):
        if settings.general_text is not None:
            window = [_text_of(min(WINDOW_TOKENS, settings.general_tokens), is_label=True)]
            yield partial(plain.loss_sum, model, window, CPU)
        for chunk in largest(by_length(held_out[: settings.generate_examples], settings.batch_size)):
            yield partial(_generate, model, chunk, pad_id, settings.max_new_tokens)


def largest(batches: Sequence[Sequence[EncodedExample]]) -> list[Sequence[EncodedExample]]:
    """The one with most tokens, padding included, and the one with most labels, which are often the same."""
    if not batches:
        return []
    by_tokens = max(batches, key=lambda batch: len(batch) * max(map(len, batch)))
    by_labels = max(batches, key=lambda batch: sum(example.num_labels for example in batch))
    return [by_tokens] if by_labels is by_tokens else [by_tokens, by_labels]


def _text_of(num_tokens: int, *, is_label: bool) -> EncodedExample:
    return EncodedExample(
        example=Example(origin="a text of this length"),
        token_ids=[0] * num_tokens,
        is_label=[is_label] * num_tokens,
        prompt_length=0,
    )


def _generate(model: nn.Module, chunk: Sequence[EncodedExample], pad_id: int, max_new_tokens: int) -> Tensor:
    """The prompts' pass, its KV cache kept; then the last token's, which copies a layer's cache to make it longer."""
    batch = collate([_text_of(item.prompt_length, is_label=False) for item in chunk], pad_id)
    output = model(
        input_ids=batch.token_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=True, logits_to_keep=1
    )
    layers: list[Any] = output.past_key_values.layers
    for layer in layers:
        longer = list(layer.keys.shape)
        longer[-2] += max_new_tokens
        layer.keys, layer.values = layer.keys.new_empty(longer), layer.values.new_empty(longer)
    return torch.cat([layers[0].keys, layers[0].values])


@contextmanager
def shape_only_products(model: nn.Module) -> Iterator[None]:
    """Tensors without data have no numbers for the compiled kernels to read."""
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    for layer in layers:
        layer.__dict__["product"] = lambda x, width=layer.out_features: x.new_empty(*x.shape[:-1], width)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["product"]
