"""Tokens per second of K LoRA adapters trained in mixed batches against K runs one after another, on one backbone.

Both take the same steps on the same seeded random token ids, in turns (together, padded, packed, together, ...), and
the model is loaded before the clock starts: separate processes would each pay for that once more. Ranks differ. Beside
the clock on the wall stands the processor's, which other processes on the machine disturb less.
    python benchmarks/training_together.py [--adapters 4] [--steps 4] [--batch-size 4] [--rounds 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from machine import machine_facts, say_if_busy, silence_peft

from polyhead_core.backbone import load_backbone
from polyhead_trainer.config import LoraSettings, TrainingSection
from polyhead_trainer.data import EncodedExample, Example
from polyhead_trainer.loop import StepReport, TrainingLoop
from polyhead_trainer.objectives import CompletionObjective
from polyhead_trainer.together.loop import Course, train_together
from polyhead_trainer.together.model import SharedBackbone

RANKS = (4, 8, 16, 32)
PROMPT_TOKENS = (12, 56)
COMPLETION_TOKENS = (4, 16)


@dataclass
class Workload:
    shared: SharedBackbone
    settings: list[TrainingSection]
    examples: list[list[EncodedExample]]


@dataclass
class Timing:
    tokens_per_s: list[float] = field(default_factory=list)
    tokens_per_cpu_s: list[float] = field(default_factory=list)
    """By the processor's time of all threads."""
    first_losses: list[float] = field(default_factory=list)
    """Of each adapter, in the first turn."""

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_s)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.tokens_per_cpu_s)


@dataclass
class Clock:
    """Adds up what passes inside of it."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __enter__(self) -> Clock:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began[0]
        self.cpu_seconds += time.process_time() - self._began[1]


@dataclass
class Losses:
    """Implements Hook."""

    reports: list[StepReport] = field(default_factory=list)

    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        self.reports.append(report)


def main() -> None:
    parser = argparse.ArgumentParser(description="K adapters in mixed batches against K separate runs.")
    parser.add_argument("--backbone", default="default")
    parser.add_argument("--quantization", default="int8", choices=("int8", "none"))
    parser.add_argument("--adapters", type=int, default=4, help="K")
    parser.add_argument("--steps", type=int, default=4, help="of each adapter in each turn")
    parser.add_argument("--batch-size", type=int, default=4, help="examples of each adapter in a step")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way; a first one is not counted")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    options = parser.parse_args()
    silence_peft()
    facts = machine_facts()
    say_if_busy(facts)
    work = prepare(options.backbone, options.quantization, options.adapters, options.steps, options.batch_size)
    found = measure(work, options.rounds)
    alone = max((name for name in found if name != "together"), key=lambda name: found[name].median)
    for name, timing in found.items():
        turns = ", ".join(f"{value:.0f}" for value in timing.tokens_per_s)
        cpu = f"{timing.cpu_median:7.1f} tokens per processor second"
        print(f"{name:<18} {timing.median:7.1f} tokens/s ({turns}), {cpu}")
    ratio = found["together"].median / found[alone].median
    cpu_ratio = found["together"].cpu_median / found[alone].cpu_median
    differences = zip(found["together"].first_losses, found[alone].first_losses, strict=True)
    print(f"together over the faster of the others ({alone}): {ratio:.2f}; by processor time {cpu_ratio:.2f}")
    print(f"largest difference of a first loss: {max(abs(one - other) for one, other in differences):.2g}")
    if options.out:
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        record = {"machine": facts, "settings": settings, "ratio": ratio, "cpu_ratio": cpu_ratio}
        record["timings"] = {name: asdict(timing) for name, timing in found.items()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


def prepare(source: str, quantization: str, num_adapters: int, num_steps: int, batch_size: int) -> Workload:
    shared = SharedBackbone(load_backbone(source, quantization=quantization))
    vocabulary: int = shared.backbone.model.config.vocab_size
    settings, examples = [], []
    for number in range(num_adapters):
        shared.add(f"adapter-{number}", LoraSettings(rank=RANKS[number % len(RANKS)]), seed=number)
        settings.append(TrainingSection(max_steps=num_steps, batch_size=batch_size, learning_rate=1e-4, seed=number))
        examples.append(made(number, num_steps * batch_size, vocabulary))
    shared.prepare([example for one in examples for example in one])
    return Workload(shared, settings, examples)


def made(seed: int, count: int, vocabulary: int) -> list[EncodedExample]:
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        prompt, completion = draw.randint(*PROMPT_TOKENS), draw.randint(*COMPLETION_TOKENS)
        found.append(
            EncodedExample(
                example=Example(origin="made"),
                token_ids=[draw.randrange(vocabulary) for _ in range(prompt + completion)],
                is_label=[False] * prompt + [True] * completion,
                prompt_length=prompt,
            )
        )
    return found


def measure(work: Workload, rounds: int) -> dict[str, Timing]:
    ways: dict[str, Callable[[], tuple[Clock, list[Losses]]]] = {
        "together": lambda: together(work),
        "separate, padded": lambda: separate(work, packing=False),
        "separate, packed": lambda: separate(work, packing=True),
    }
    found = {name: Timing() for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            clock, losses = way()
            if turn == 0:
                found[name].first_losses = [one.reports[0].loss for one in losses]
            else:
                num_tokens = sum(report.num_tokens for one in losses for report in one.reports)
                found[name].tokens_per_s.append(num_tokens / clock.seconds)
                found[name].tokens_per_cpu_s.append(num_tokens / clock.cpu_seconds)
    return found


def together(work: Workload) -> tuple[Clock, list[Losses]]:
    kept = [Losses() for _ in work.settings]
    courses = [
        Course(member=member, loop=loop, hooks=[keep])
        for member, loop, keep in zip(work.shared.members, loops(work, packing=True), kept, strict=True)
    ]
    clock = Clock()
    with clock:
        train_together(work.shared, courses, work.settings[0])
    return clock, kept


def separate(work: Workload, *, packing: bool) -> tuple[Clock, list[Losses]]:
    kept = [Losses() for _ in work.settings]
    clock = Clock()
    for member, loop, keep in zip(work.shared.members, loops(work, packing=packing), kept, strict=True):
        with work.shared.only(member), clock:
            loop.run([keep])
    return clock, kept


def loops(work: Workload, *, packing: bool) -> Sequence[TrainingLoop]:
    """Fresh optimizers over adapters that are as new: their B are set back to nought."""
    objective = CompletionObjective(pad_id=0, packing=packing)
    made_loops = []
    for member, settings, examples in zip(work.shared.members, work.settings, work.examples, strict=True):
        with work.shared.only(member):
            for layer in member.layers.values():
                layer.reset_lora_parameters("default", True)
            made_loops.append(TrainingLoop(member.tuned, objective, examples, settings))
    return made_loops


if __name__ == "__main__":
    main()
