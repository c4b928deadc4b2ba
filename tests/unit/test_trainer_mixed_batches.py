"""Several adapters over one backbone, each of them as if it were alone: gradients, losses, weights, random numbers."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polyhead_core.backbone import Backbone, load_backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer import methods
from polyhead_trainer.config import LoraSettings, TrainingSection
from polyhead_trainer.data import EncodedExample, Example
from polyhead_trainer.loop import StepReport, TrainingLoop, accumulate_gradients
from polyhead_trainer.methods import trained_parameters
from polyhead_trainer.objectives import CompletionObjective
from polyhead_trainer.packing import prepare_packing
from polyhead_trainer.together.loop import Course, train_together
from polyhead_trainer.together.model import Share, SharedBackbone
from tiny import save_backbone

PACKED = CompletionObjective(pad_id=0, packing=True)
PADDED = CompletionObjective(pad_id=0)
Outcome = tuple[list[StepReport], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are most of what so small a model would do."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@dataclass
class Keep:
    """Implements Hook."""

    reports: list[StepReport] = field(default_factory=list)

    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        self.reports.append(report)


def made(seed: int, count: int = 12) -> list[EncodedExample]:
    draw = random.Random(seed)
    examples = []
    for number in range(count):
        prompt, completion = draw.randint(2, 9), draw.randint(1, 6)
        examples.append(
            EncodedExample(
                example=Example(origin=f"made-{seed}:{number + 1}"),
                token_ids=[draw.randint(4, 280) for _ in range(prompt + completion)],
                is_label=[False] * prompt + [True] * completion,
                prompt_length=prompt,
            )
        )
    return examples


@dataclass(frozen=True)
class Case:
    """One adapter, its data and its training."""

    adapter: LoraSettings
    training: TrainingSection
    examples: list[EncodedExample]


def cases(dropout: float = 0.0) -> list[Case]:
    """Other ranks, alphas, scales, targets, layers, rates, batch sizes, schedules, seeds and lengths."""
    return [
        Case(
            LoraSettings(rank=4, alpha=8, dropout=dropout),
            TrainingSection(max_steps=6, batch_size=4, learning_rate=5e-3, seed=0),
            made(1),
        ),
        Case(
            LoraSettings(rank=9, alpha=7, use_rslora=True, target_modules=["q_proj", "down_proj"], dropout=dropout),
            TrainingSection(max_steps=4, batch_size=5, micro_batch_size=2, learning_rate=1e-2, seed=7),
            made(2),
        ),
        Case(
            LoraSettings(rank=2, alpha=32, layers=[1, 2], rank_pattern={"v_proj": 6}, lora_plus_ratio=4.0),
            TrainingSection(epochs=1, batch_size=3, schedule="linear", optimizer="sgd", momentum=0.5, seed=3),
            made(3, count=7),
        ),
    ]


def load(folder: Path, quantization: str = "none", kind: str = "llama") -> Backbone:
    directory = folder / kind
    if not directory.exists():
        save_backbone(kind, directory)
    return load_backbone(str(directory), quantization=quantization, cache_dir=folder / "cache")


def everything(all_cases: Sequence[Case]) -> list[EncodedExample]:
    return [example for case in all_cases for example in case.examples]


def named(loop: TrainingLoop) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in loop.tuned.trained_state().items()}


def apart(case: Case, backbone: Backbone, objective: CompletionObjective) -> Outcome:
    """A run of its own."""
    tuned = methods.tune(backbone, case.adapter, case.training.seed)
    if objective.packing:
        prepare_packing(tuned.model, case.examples, pad_id=0)
    keep, loop = Keep(), TrainingLoop(tuned, objective, case.examples, case.training)
    loop.run([keep])
    return keep.reports, named(loop)


def start(all_cases: Sequence[Case], backbone: Backbone, **options: Any) -> tuple[SharedBackbone, list[Course]]:
    shared = SharedBackbone(backbone, **options)
    courses = []
    for number, case in enumerate(all_cases):
        member = shared.add(f"adapter-{number}", case.adapter, case.training.seed)
        with shared.only(member):
            loop = TrainingLoop(member.tuned, PADDED, case.examples, case.training)
        courses.append(Course(member=member, loop=loop, hooks=[Keep()]))
    shared.prepare(everything(all_cases))
    return shared, courses


def ran(
    all_cases: Sequence[Case], backbone: Backbone, **options: Any
) -> list[tuple[list[StepReport], dict[str, Tensor]]]:
    shared, courses = start(all_cases, backbone, **options)
    train_together(shared, courses, TrainingSection(max_steps=1))
    assert [course.failure for course in courses] == [None] * len(courses)
    found = []
    for course in courses:
        keep = course.hooks[0]
        assert isinstance(keep, Keep)
        with shared.only(course.member):
            found.append((keep.reports, named(course.loop)))
    return found


@pytest.mark.parametrize(
    ("kind", "objective"),
    [("llama", PACKED), ("llama", PADDED), ("llama-untied", PADDED), ("mistral", PADDED), ("qwen3", PACKED)],
    ids=["llama-packed", "llama-padded", "llama-untied", "mistral", "qwen3"],
)
def test_gradients_are_those_of_separate_passes(tmp_path: Path, kind: str, objective: CompletionObjective) -> None:
    """In float32 on a float32 backbone, to rounding; the adapters' B are set at random, else A's gradients were 0."""
    settings = [case.adapter for case in cases()]
    steps = [case.examples[: 3 + number] for number, case in enumerate(cases())]
    shared = SharedBackbone(load(tmp_path, kind=kind))
    members = [shared.add(str(number), one, seed=number) for number, one in enumerate(settings)]
    shared.prepare(everything(cases()))
    for member in members:
        with shared.only(member):
            for name, parameter in trained_parameters(member.tuned.model).items():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
    expected = []
    for member, chosen in zip(members, steps, strict=True):
        with shared.only(member):
            loss = accumulate_gradients(member.tuned.model, objective, chosen, 2)
            parameters = trained_parameters(member.tuned.model)
            expected.append((loss, {name: parameter.grad.clone() for name, parameter in parameters.items()}))
            member.tuned.model.zero_grad()
    shares = [
        Share(member=member, examples=chosen, micro_batch_size=2) for member, chosen in zip(members, steps, strict=True)
    ]
    with shared.together():
        losses = shared.accumulate_gradients(shares)
    for member, loss, (expected_loss, gradients) in zip(members, losses, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        with shared.only(member):
            found = trained_parameters(member.tuned.model)
            assert found.keys() == gradients.keys()
            for name, gradient in gradients.items():
                scale = gradient.abs().max()
                assert scale > 0
                assert (found[name].grad - gradient).abs().max() < 1e-4 * scale, name


@pytest.mark.parametrize("logit_chunk", [0, 288 * 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_whole_trainings_are_those_of_separate_runs(tmp_path: Path, dropout: float, logit_chunk: int) -> None:
    """Of 6, 4 and 3 steps; with dropout the random numbers are the very ones as well."""
    all_cases = cases(dropout)
    together = ran(all_cases, load(tmp_path), logit_chunk=logit_chunk)
    assert [len(reports) for reports, _ in together] == [6, 4, 3]
    for case, (reports, weights) in zip(all_cases, together, strict=True):
        expected, expected_weights = apart(case, load(tmp_path), PACKED)
        assert [report.loss for report in reports] == pytest.approx([report.loss for report in expected], rel=1e-4)
        norms = [report.grad_norm for report in expected]
        assert [report.grad_norm for report in reports] == pytest.approx(norms, rel=1e-3)
        for one, other in zip(reports, expected, strict=True):
            assert (one.step, one.num_steps, one.learning_rate) == (other.step, other.num_steps, other.learning_rate)
            assert (one.num_tokens, one.num_labels) == (other.num_tokens, other.num_labels)
        assert weights.keys() == expected_weights.keys()
        for name, tensor in weights.items():
            # As a whole: where a gradient is next to nothing, Adam makes a step of its rounding.
            assert (tensor - expected_weights[name]).norm() < 2e-3 * expected_weights[name].norm(), name


def test_on_int8_losses_are_bit_equal_and_gradients_equal_to_rounding(tmp_path: Path) -> None:
    """Forward, every row of an int8 product is computed by itself; backward, the product is the BLAS's."""
    chosen = [case.examples[:4] for case in cases()]
    backbone = load(tmp_path, "int8")
    expected = []
    for case, examples in zip(cases(), chosen, strict=True):
        tuned = methods.tune(load(tmp_path, "int8"), case.adapter, case.training.seed)
        prepare_packing(tuned.model, case.examples, pad_id=0)
        loss = accumulate_gradients(tuned.model, PACKED, examples, 4)
        expected.append((loss, {name: p.grad for name, p in trained_parameters(tuned.model).items()}))
    shared, courses = start(cases(), backbone)
    shares = [
        Share(member=course.member, examples=examples, micro_batch_size=4)
        for course, examples in zip(courses, chosen, strict=True)
    ]
    with shared.together():
        losses = shared.accumulate_gradients(shares)
    assert losses == [loss for loss, _ in expected]
    for member, (_, gradients) in zip(shared.members, expected, strict=True):
        with shared.only(member):
            for name, parameter in trained_parameters(member.tuned.model).items():
                assert (parameter.grad - gradients[name]).abs().max() <= 1e-5 * gradients[name].abs().max(), name


def set_nan(shared: SharedBackbone, number: int) -> None:
    with shared.only(shared.members[number]):
        for name, parameter in trained_parameters(shared.members[number].tuned.model).items():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, math.nan)


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_no_bit_of_one_adapters_nan_reaches_another(tmp_path: Path, quantization: str) -> None:
    found = []
    for sick in (False, True):
        shared, courses = start(cases(), load(tmp_path, quantization))
        if sick:
            set_nan(shared, 1)
        shares = [Share(member=course.member, examples=made(9)[:4], micro_batch_size=4) for course in courses]
        with shared.together():
            losses = shared.accumulate_gradients(shares)
        assert math.isnan(losses[1]) == sick
        gradients = []
        for member in (shared.members[0], shared.members[2]):
            with shared.only(member):
                gradients += [p.grad for p in trained_parameters(member.tuned.model).values()]
        found.append((losses[0], losses[2], gradients))
    assert found[0][:2] == found[1][:2]
    for healthy, beside_nan in zip(found[0][2], found[1][2], strict=True):
        assert torch.equal(healthy, beside_nan)


def test_an_adapter_that_diverges_ends_alone(tmp_path: Path) -> None:
    all_cases = cases()
    shared, courses = start(all_cases, load(tmp_path))
    set_nan(shared, 1)
    train_together(shared, courses, TrainingSection(max_steps=1))
    assert courses[1].failure is not None
    assert "step 1: loss nan" in courses[1].failure.message
    assert courses[1].failure.examples[0].example.origin.startswith("made-2:")
    assert [len(course.hooks[0].reports) for course in courses] == [6, 0, 3]  # type: ignore[attr-defined]
    for number in (0, 2):
        assert courses[number].failure is None
        expected, _ = apart(all_cases[number], load(tmp_path), PACKED)
        losses = [report.loss for report in courses[number].hooks[0].reports]  # type: ignore[attr-defined]
        assert losses == pytest.approx([report.loss for report in expected], rel=1e-4)


def test_checkpointed_layers_give_the_same_training(tmp_path: Path) -> None:
    outcomes = []
    for how in ("none", "all"):
        shared, courses = start(cases(), load(tmp_path))
        settings = TrainingSection.model_validate({"max_steps": 1, "activation_checkpointing": how})
        train_together(shared, courses, settings)
        outcomes.append([[report.loss for report in course.hooks[0].reports] for course in courses])  # type: ignore[attr-defined]
    assert outcomes[0] == outcomes[1]


def test_the_bare_backbone_is_back_in_between(tmp_path: Path) -> None:
    backbone = load(tmp_path)
    ids_BT = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = backbone.model(ids_BT).logits
    shared, courses = start(cases(), backbone)
    train_together(shared, courses, TrainingSection(max_steps=1))
    with torch.no_grad():
        assert torch.equal(backbone.model(ids_BT).logits, before)
        with shared.only(courses[0].member):
            assert not torch.equal(courses[0].member.tuned.model(ids_BT).logits, before)
    assert not any("lora" in name for name, _ in backbone.model.named_modules())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_layers_outside_of_the_decoder_are_refused(tmp_path: Path, target: str) -> None:
    shared = SharedBackbone(load(tmp_path))
    with pytest.raises(ConfigError, match=rf"\[\[adapters\]\] one: adapter.target_modules holds .*{target}"):
        shared.add("one", LoraSettings(target_modules=["q_proj", target]), seed=0)


def test_backbones_that_mix_rows_are_refused(tmp_path: Path) -> None:
    backbone = load(tmp_path)
    with pytest.raises(ConfigError, match=r"backbone.quantization = llm.int8.*outlier columns"):
        SharedBackbone(dataclasses.replace(backbone, quantization="llm.int8"))
    backbone.model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ConfigError, match=r"drops out activations of its own \(model.layers.0.self_attn\)"):
        SharedBackbone(backbone)


def test_the_benchmark_trains_the_same_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    benchmark = import_module("training_together")
    save_backbone("llama", tmp_path / "llama")
    work = benchmark.prepare(str(tmp_path / "llama"), "none", num_adapters=2, num_steps=2, batch_size=2)
    found = benchmark.measure(work, rounds=1)
    assert list(found) == ["together", "separate, padded", "separate, packed"]
    for timing in found.values():
        assert timing.first_losses == pytest.approx(found["together"].first_losses, rel=1e-5)
        assert len(timing.tokens_per_s) == len(timing.tokens_per_cpu_s) == 1
        assert timing.median > 0
