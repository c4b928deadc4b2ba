"""What a run's passes over the model hold at their fullest moment: dry runs of its largest batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polyhead_core.int8 import Int8Linear
from polyhead_trainer.batching import collate
from polyhead_trainer.config import EvaluateSection, RunConfig
from polyhead_trainer.data import EncodedExample, Example
from polyhead_trainer.estimate.dry_run import DryRun, Held
from polyhead_trainer.estimate.ranks import Alone
from polyhead_trainer.evaluate import WINDOW_TOKENS, Evaluator, by_length
from polyhead_trainer.methods import Tuned
from polyhead_trainer.objectives import Objective
from polyhead_trainer.objectives.preference import EncodedPair
from polyhead_trainer.optimizers import make_optimizer
from polyhead_trainer.tasks import Task
from polyhead_trainer.tasks.preference import PreferenceEvaluator, PreferenceTask

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
    ranks: Alone,
    *,
    passes: Sequence[Pass],
    update: Pass,
    evaluations: Iterable[Pass],
    accumulates: bool,
) -> Peaks:
    """Of the costliest of `passes` and `evaluations`.

    `accumulates`: a pass may begin with the gradients of one before it.
    """
    step = Held()
    for number, run in enumerate([*passes[:1], *passes] if accumulates else passes):
        if number and not accumulates:
            ranks.drop_gradients()
        dry.restart()
        run()
        ranks.after_backward()
        step = max(step, dry.peak, key=lambda held: held.total)
    ranks.before_update()
    before = dry.held
    dry.restart()
    update()
    states = dry.held.total - before.total
    in_update = dry.peak.total - before.activations - states
    ranks.drop_gradients()
    held, evaluation = dry.held.activations, 0
    for run in evaluations:
        dry.restart()
        with torch.no_grad():
            run()
        evaluation = max(evaluation, dry.peak.total - held)
        ranks.after_forward()
    return Peaks(step=step, gradients=before.gradients, update=in_update, evaluation=evaluation)


def optimizer_step(tuned: Tuned, ranks: Alone, config: RunConfig) -> Pass:
    settings = config.training
    if settings.optimizer in OUTSIDE_TORCH:
        return lambda: None
    optimizer = make_optimizer(ranks.stepped_groups(tuned.parameter_groups(settings)), settings)
    for group in optimizer.param_groups:
        # torch's choice for parameters on a GPU: all of them at once, each with a tensor of its own by the way.
        group["foreach"] = torch.device(config.backbone.device).type == "cuda"
    return optimizer.step


def text_evaluator(task: Task, settings: EvaluateSection, held_out: Sequence[EncodedExample]) -> Evaluator | None:
    """What the run measures completions, general text and earlier tasks with; None: the task has none of them.

    Raises ConfigError, DataError.
    """
    # With pairs it would ask the backbone, which has no numbers, for their likelihoods.
    evaluator = task.evaluator([] if isinstance(task, PreferenceTask) else held_out)
    if isinstance(evaluator, PreferenceEvaluator):
        chosen = [item.chosen for item in held_out if isinstance(item, EncodedPair)]
        measured, answered = chosen[: settings.max_examples or None], chosen[: settings.generate_examples]
        return replace(evaluator.completions, held_out=measured, answered=answered)
    return evaluator if isinstance(evaluator, Evaluator) else None


def evaluation_passes(
    config: RunConfig,
    model: nn.Module,
    objective: Objective,
    held_out: Sequence[EncodedExample],
    evaluator: Evaluator | None,
) -> Iterator[Pass]:
    """As the task's evaluator makes them, of the batches that cost most. `evaluator`: as text_evaluator has it."""
    settings = config.evaluate
    model.eval()
    if config.task != "completion":
        for chunk in largest(by_length(held_out[: settings.max_examples or None], settings.batch_size)):
            yield partial(objective.loss_sum, model, chunk, CPU)
    if evaluator is not None:
        yield from _text_passes(model, evaluator, settings.batch_size)
    if config.task != "classification":
        answered = by_length(held_out[: settings.generate_examples], settings.batch_size)
        prompts = [[_text_of(item.prompt_length, is_label=False) for item in chunk] for chunk in answered]
        for chunk in largest(prompts):
            yield partial(_generate, model, chunk, settings.max_new_tokens)


def _text_passes(model: nn.Module, evaluator: Evaluator, batch_size: int) -> Iterator[Pass]:
    for chunk in largest(by_length(evaluator.held_out, batch_size)):
        yield partial(replace(evaluator, held_out=list(chunk)).held_out_loss, model)
    for chunk in largest(by_length(evaluator.earlier, batch_size)):
        yield partial(replace(evaluator, earlier=list(chunk)).earlier_loss, model)
    if evaluator.general_ids:
        window = _text_of(min(WINDOW_TOKENS, len(evaluator.general_ids)), is_label=True)
        yield partial(replace(evaluator, held_out=[window], choice_ids=[]).held_out_loss, model)


def largest(batches: Iterable[Sequence[EncodedExample]], *, packed: bool = False) -> list[Sequence[EncodedExample]]:
    """The one with most tokens, padding included unless they are packed, and the one with most labels, which are often
    the same."""
    found: dict[str, tuple[int, Sequence[EncodedExample]]] = {}
    for batch in batches:
        num_tokens = sum(map(len, batch)) if packed else len(batch) * max(item.width for item in batch)
        num_labels = sum(item.num_labels for item in batch)
        for name, size in (("tokens", num_tokens), ("labels", num_labels)):
            if name not in found or size > found[name][0]:
                found[name] = size, batch
    return list({id(batch): batch for _, batch in found.values()}.values())


def _text_of(num_tokens: int, *, is_label: bool) -> EncodedExample:
    return EncodedExample(
        example=Example(origin="a text of this length"),
        token_ids=[0] * num_tokens,
        is_label=[is_label] * num_tokens,
        prompt_length=0,
    )


def _generate(model: Any, prompts: Sequence[EncodedExample], max_new_tokens: int) -> Tensor:
    """The prompts' pass, its KV cache kept; then the last token's, which copies a layer's cache to make it longer."""
    batch = collate(prompts, pad_id=0)
    inputs: dict[str, Any] = {"input_ids": batch.token_ids_BT, "attention_mask": batch.attention_mask_BT}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch.token_ids_BT[:, :1]
    else:
        inputs["logits_to_keep"] = 1
    cache = model(**inputs, use_cache=True).past_key_values
    layers: list[Any] = getattr(cache, "self_attention_cache", cache).layers
    for layer in layers:
        longer = list(layer.keys.shape)
        longer[-2] += max_new_tokens
        layer.keys, layer.values = layer.keys.new_empty(longer), layer.values.new_empty(longer)
    return torch.cat([layers[0].keys, layers[0].values])


@contextmanager
def shape_only_products(model: nn.Module, *, on_cpu: bool, packed: Mapping[Int8Linear, int] = {}) -> Iterator[None]:
    """Tensors without data have no numbers for the compiled kernels to read.

    `on_cpu`: where they take float32 alone; `packed`: bytes of a packed copy that a layer makes for one product alone.
    """

    def product(x: Tensor, layer: Int8Linear) -> Tensor:
        taken = x.new_empty(packed.get(layer, 0), dtype=torch.uint8), x.float() if on_cpu else x
        y = x.new_empty(*x.shape[:-1], layer.out_features, dtype=torch.float32)
        del taken
        return y.to(x.dtype)

    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    for layer in layers:
        layer.__dict__["product"] = partial(product, layer=layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["product"]
