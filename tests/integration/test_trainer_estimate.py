"""`trainer estimate` against what a run holds: part by part, and at its fullest moment, as torch's profiler sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import bitsandbytes
import pytest
import test_trainer_classification
import test_trainer_preference
from rich.console import Console
from test_trainer_methods import CASES, case_configuration
from test_trainer_run import configuration, run_quietly
from test_trainer_seq2seq import seq2seq_configuration
from together_runs import COLOURS, SIZES, write_data, write_run
from torch import nn
from torch.profiler import ProfilerActivity, profile

from polyhead_core.errors import ConfigError
from polyhead_core.int8 import Int8Linear
from polyhead_trainer import backbones, methods
from polyhead_trainer.config import RunConfig, TogetherConfig, load_run
from polyhead_trainer.data import EncodedExample, Example
from polyhead_trainer.estimate import empty_backbone, estimate
from polyhead_trainer.estimate.passes import largest
from polyhead_trainer.loop import TrainingLoop
from polyhead_trainer.objectives.preference import EncodedPair
from polyhead_trainer.together import run as together
from polyhead_trainer.together.model import SharedBackbone
from rank_memory import EVALUATORS
from tiny import save_backbone

T = TypeVar("T")
BIG = "training.batch_size=18"
TASKS: dict[str, Callable[[Path], RunConfig]] = {
    "int8": lambda folder: configuration(folder, BIG),
    "llm.int8": lambda folder: configuration(folder, BIG, "backbone.quantization=llm.int8"),
    "nf4": lambda folder: configuration(folder, BIG, "backbone.quantization=nf4"),
    "nf4 in bfloat16": lambda folder: configuration(
        folder, BIG, "backbone.quantization=nf4", "backbone.dtype=bfloat16"
    ),
    "full": lambda folder: configuration(
        folder, BIG, "adapter={method = 'full'}", "backbone.quantization=none", "backbone.dtype=float32"
    ),
    "micro-batches": lambda folder: configuration(
        folder, BIG, "training.micro_batch_size=7", "adapter={method = 'full'}", "backbone.quantization=none"
    ),
    "packed": lambda folder: configuration(folder, BIG, "training.packing=true"),
    "checkpointed": lambda folder: configuration(folder, BIG, "training.activation_checkpointing=all"),
    "selective": lambda folder: configuration(folder, BIG, "training.activation_checkpointing=selective"),
    "chunked": lambda folder: configuration(folder, BIG, "training.logit_chunk=2000"),
    "earlier": lambda folder: configuration(folder, f"evaluate.earlier={write_earlier(folder)}"),
    "8-bit optimizer": lambda folder: configuration(
        folder, BIG, "training.optimizer=adamw-8bit", "adapter={method = 'full'}", "backbone.quantization=none"
    ),
    "seq2seq": lambda folder: seq2seq_configuration(folder, BIG),
    "seq2seq, long answers": lambda folder: seq2seq_configuration(
        folder, "training.micro_batch_size=1", "evaluate.max_new_tokens=100", "evaluate.generate_examples=6"
    ),
    "preference": lambda folder: test_trainer_preference.configuration(folder, "training.batch_size=16"),
    "preference, chunked": lambda folder: test_trainer_preference.configuration(
        folder, "training.batch_size=1", "training.logit_chunk=500", "evaluate.batch_size=16"
    ),
    "head": lambda folder: test_trainer_classification.configuration(
        folder, {"method": "head", "hidden": [24, 16]}, "training.max_steps=3"
    ),
    **{name: lambda folder, case=case: case_configuration(folder, case, BIG) for name, case in CASES.items()},
}


def write_earlier(folder: Path) -> list[str]:
    """Longer texts than the run's own: the costliest batches of all."""
    rows = [{"prompt": f"Tell {number} of it:", "completion": " again" * (30 + number)} for number in range(20)]
    (folder / "earlier.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / "earlier.jsonl")]


class Meter:
    """Bytes of tensors that a run held, from torch's profiler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = self.training = self.left = self.evaluation = 0
        self._is_measuring = False
        run = TrainingLoop.run

        def measured_run(loop: TrainingLoop, hooks: Any) -> None:
            self.model = held_by(loop.tuned.model)
            self.training, self.left = fullest(lambda: run(loop, hooks))

        monkeypatch.setattr(TrainingLoop, "run", measured_run)
        for kind in EVALUATORS:
            monkeypatch.setattr(kind, "measure", self._measured(kind.measure))

    @property
    def peak(self) -> int:
        return self.model + max(self.training, self.left + self.evaluation)

    def _measured(self, measure: Callable[[Any, nn.Module], T]) -> Callable[[Any, nn.Module], T]:
        def measured(evaluator: Any, model: nn.Module) -> T:
            if self._is_measuring:  # an evaluator within another: there is one profiler at a time
                return measure(evaluator, model)
            found: list[T] = []
            self._is_measuring = True
            self.evaluation, _ = fullest(lambda: found.append(measure(evaluator, model)))
            self._is_measuring = False
            return found[0]

        return measured


def held_by(model: nn.Module) -> int:
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    packed = [layer._packed for layer in model.modules() if isinstance(layer, Int8Linear)]
    return (
        sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        + sum(layer.num_bytes() for layer in packed if layer is not None)
        + scale_bytes(model)
    )


def scale_bytes(model: nn.Module) -> int:
    """Of what bitsandbytes keeps beside the parameters, where nothing that lists parameters or buffers finds it."""
    found = 0
    for weight in model.parameters():
        if getattr(weight, "SCB", None) is not None:
            found += weight.SCB.nbytes
        if (four_bit := getattr(weight, "quant_state", None)) is not None:
            scales = four_bit.state2
            found += sum(
                t.nbytes for t in (four_bit.absmax, four_bit.code, four_bit.offset, scales.absmax, scales.code)
            )
    return found


def fullest(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes that `run` allocated: held at its fullest moment, and at its end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, held


def allow_nf4_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hardly learns there, but holds what it holds. Without the layout that bitsandbytes gives weights on processors
    with AVX-512 BF16 once they are evaluated, which the device that NF4 is for does not have."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    for module in (backbones, empty_backbone):
        monkeypatch.setattr(module, "check_loadable", lambda *_: None)


SLOW = {"preference, chunked", "seq2seq, long answers"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TASKS]
)
def test_the_peak_is_that_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    allow_nf4_on_the_cpu(monkeypatch)
    config = TASKS[name](tmp_path)
    meter = Meter(monkeypatch)
    run_quietly(config)
    predicted = estimate(config)
    print(name, predicted.parts(), "measured", vars(meter), predicted.peak / meter.peak)
    assert predicted.peak == pytest.approx(meter.peak, rel=0.1)


def test_adapters_trained_together_have_the_peak_of_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for what, values in (("colour", COLOURS), ("size", SIZES)):
        write_data(tmp_path, what, values)
    save_backbone("llama", tmp_path / "backbone")
    config = load_run(write_run(tmp_path, tmp_path))
    assert isinstance(config, TogetherConfig)
    train, found = together.train_together, []

    def measured_training(shared: SharedBackbone, *others: Any) -> None:
        with shared.together():
            model = held_by(shared.backbone.model)
        found.append(model + fullest(lambda: train(shared, *others))[0])

    monkeypatch.setattr(together, "train_together", measured_training)
    together.run_together(config, Console(quiet=True))
    assert estimate(config).peak == pytest.approx(found[0], rel=0.1)
    with pytest.raises(ConfigError, match="leave --nproc out"):
        estimate(config, nproc=2)


@pytest.mark.parametrize("quantization", ["int8", "none", "llm.int8", "nf4"])
def test_weights_and_adapter_are_what_a_run_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    allow_nf4_on_the_cpu(monkeypatch)
    config = configuration(tmp_path, f"backbone.quantization={quantization}")
    predicted = estimate(config)
    backbone = backbones.load(config.backbone)
    assert predicted.weights == pytest.approx(backbone.num_bytes + scale_bytes(backbone.model), rel=0.01)
    model = methods.tune(backbone, config.adapter, 0).model
    assert predicted.adapter == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert predicted.optimizer == 2 * predicted.gradients == 2 * predicted.adapter
    assert (predicted.batch.num_rows, predicted.activations > 0) == (6, True)


def test_copies_of_what_is_trained_are_counted(tmp_path: Path) -> None:
    """A checkpoint's copy is freed by another thread, which the profiler does not see."""
    kept = estimate(configuration(tmp_path))
    assert kept.copies == 2 * kept.adapter
    options = ("checkpoint.every_steps=2", "training.evaluate_every=1", "training.keep=best")
    more = estimate(configuration(tmp_path, *options))
    assert more.copies == (2 + 1 + 1 + 2 + 1) * kept.adapter
    assert more.peak == kept.peak + more.copies - kept.copies


def test_smaller_micro_batches_need_fewer_activations(tmp_path: Path) -> None:
    whole = estimate(configuration(tmp_path))
    half = estimate(configuration(tmp_path, "training.micro_batch_size=3"))
    assert half.activations < 0.6 * whole.activations
    assert half.weights == whole.weights


def test_two_ranks_hold_half_and_gather_layers(tmp_path: Path) -> None:
    whole, half = (estimate(configuration(tmp_path), nproc=nproc) for nproc in (1, 2))
    assert half.optimizer == pytest.approx(whole.optimizer / 2, rel=0.01)
    assert half.batch.num_rows == whole.batch.num_rows / 2
    assert whole.gathered == 0 < half.gathered < whole.weights + whole.adapter
    replica = estimate(configuration(tmp_path, "parallel.strategy=ddp"), nproc=2)
    assert (replica.weights, replica.optimizer) == (whole.weights, whole.optimizer)


def test_shards_in_host_memory_and_gathered_in_a_smaller_type_are_counted_so(tmp_path: Path) -> None:
    on_cuda = ("backbone.device=cuda", "backbone.dtype=float32", "backbone.quantization=none")
    whole, halved, offloaded = (
        estimate(configuration(tmp_path, *on_cuda, *more), nproc=2)
        for more in ((), ("parallel.param_dtype=bfloat16",), ("parallel.cpu_offload=true",))
    )
    assert halved.gathered == whole.gathered / 2
    assert halved.activations < 0.7 * whole.activations
    kept = whole.weights + whole.adapter + whole.optimizer
    assert whole.peak - kept - whole.gradients <= offloaded.peak <= whole.peak - kept


def test_an_optimizer_on_a_gpu_takes_all_parameters_at_once(tmp_path: Path) -> None:
    """torch's choice there, which cannot be measured here: one more tensor for each of them by the way."""
    wide = str(save_backbone("llama", tmp_path / "wide", hidden_size=512, intermediate_size=1024))
    settings = ["adapter={method = 'full'}", "backbone.quantization=none", "backbone.dtype=float32"]
    settings += ["training.micro_batch_size=1", "evaluate.batch_size=1"]
    on_cpu, on_gpu = (
        estimate(configuration(tmp_path, *settings, f"backbone.device={device}", backbone=wide))
        for device in ("cpu", "cuda")
    )
    lasting = on_gpu.weights + on_gpu.gradients + on_gpu.optimizer
    assert on_cpu.peak < lasting + 0.5 * on_cpu.gradients
    assert lasting + on_gpu.gradients <= on_gpu.peak < lasting + 1.1 * on_gpu.gradients


def test_the_costliest_batches_are_those_with_most_tokens_and_with_most_labels() -> None:
    def text(num_tokens: int, num_labels: int = 1) -> EncodedExample:
        is_label = [False] * (num_tokens - num_labels) + [True] * num_labels
        return EncodedExample(
            example=Example(origin=""), token_ids=[0] * num_tokens, is_label=is_label, prompt_length=1
        )

    one_long, even, short = [text(50), text(10)], [text(40), text(40)], [text(20, 19), text(2)]
    assert largest([short, one_long, even, one_long]) == [one_long, short]
    assert largest(iter([short, one_long, even]), packed=True) == [even, short]
    assert largest([[text(3, 3)], [text(2, 2)]]) == [[text(3, 3)]]
    pair = EncodedPair(**vars(text(30)), rejected=text(60))
    assert largest([[text(70)], [pair]]) == [[text(70)], [pair]], "a pair is two rows, of which none is 90 tokens wide"
    assert largest([]) == []


def test_the_settings_that_save_memory_are_seen(tmp_path: Path) -> None:
    plain = estimate(configuration(tmp_path, "adapter.rank=64"))
    checkpointed = estimate(configuration(tmp_path, "adapter.rank=64", "training.activation_checkpointing=all"))
    assert checkpointed.activations < 0.7 * plain.activations
    eight_bit = estimate(configuration(tmp_path, "adapter.rank=64", "training.optimizer=adamw-8bit"))
    assert eight_bit.optimizer < 0.5 * plain.optimizer
    many_tokens = str(save_backbone("llama", tmp_path / "many-tokens", vocab_size=8192))
    chunked, whole = (
        estimate(configuration(tmp_path, f"training.logit_chunk={most}", backbone=many_tokens)) for most in (50_000, 0)
    )
    assert chunked.activations < 0.8 * whole.activations
    assert chunked.evaluation < 0.8 * whole.evaluation
