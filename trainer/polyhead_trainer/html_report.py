"""report.html: one run for people, in one file that loads nothing. The template escapes everything that it is given."""

from __future__ import annotations

import base64
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from polyhead_trainer.config import flat_settings
from polyhead_trainer.record import RunRecord, TrainableFacts, package_versions
from polyhead_trainer.report import FORMS, OPERATORS_SHOWN

if TYPE_CHECKING:
    from polyhead_trainer.evaluate import Measures

TEMPLATE = "report.html.jinja"
NOT_READABLE = "not readable"


def render(record: RunRecord, loss_curve_png: bytes) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("polyhead_trainer").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    config = record.config
    return template.render(
        title=config.title or config.output.name,
        summary=_summary(record),
        measures=_measures(record.before, record.after),
        forgetting=_forgetting(record.before, record.after),
        loss_curve=base64.b64encode(loss_curve_png).decode("ascii"),
        held_out_curve=[(step, f"{loss:.4f}") for step, loss in record.held_out_curve],
        answers=_answers(record),
        training=_training(record),
        operators=[
            (one.name, f"{one.calls:g}", f"{one.seconds * 1000:.2f}", f"{one.share:.1%}")
            for one in record.operators[:OPERATORS_SHOWN]
        ],
        data=_data(record),
        settings=list(flat_settings(config).items()),
        versions=list(package_versions().items()),
    )


def _summary(record: RunRecord) -> str:
    config = record.config
    what = "The model" if config.adapter.method == "full" else "An adapter"
    return (
        f"{what} {config.output.name} ({config.adapter.describe()}) for {record.backbone.source}, task {config.task}: "
        f"{len(record.curve)} steps in {record.train_seconds:.0f} s."
    )


def _measures(before: Measures, after: Measures) -> list[tuple[str, str, str, str]]:
    """(measure, before, after, change) of everything that was measured."""
    rows = []
    for field, (title, form) in FORMS.items():
        old, new = getattr(before, field), getattr(after, field)
        if old is not None and new is not None:
            rows.append((title, format(old, form), format(new, form), format(new - old, f"+{form}")))
    return rows


def _forgetting(before: Measures, after: Measures) -> list[str]:
    """One sentence for each of its measures: on both, more is worse."""
    found = []
    for what, old, new in (
        ("Perplexity of general text, which was not learned", before.general_perplexity, after.general_perplexity),
        ("Loss (nats) on the data of earlier tasks", before.earlier_loss, after.earlier_loss),
    ):
        if old is not None and new is not None:
            verdict = "forgot" if new > old else "did not forget"
            change = f" ({new / old - 1:+.1%})" if old else ""
            found.append(f"{what}: {old:.2f} before, {new:.2f} after{change}: by this measure the run {verdict}.")
    return found or ["Not measured: neither evaluate.general_text nor evaluate.earlier names data to measure it on."]


def _answers(record: RunRecord) -> list[dict[str, Any]]:
    rows = zip(record.questions, record.references, record.before.answers, record.after.answers, strict=True)
    return [
        {
            "question": question,
            "reference": reference,
            "given": [(text, text.strip() == reference.strip()) for text in (before, after)],
        }
        for question, reference, before, after in rows
    ]


def _training(record: RunRecord) -> list[tuple[str, str]]:
    trainable = record.trainable
    tokens = sum(step.num_tokens for step in record.curve)
    labels = sum(step.num_labels for step in record.curve)
    energy = [f"{name}: {joules:,.0f} J" for name, joules in record.energy_joules.items()]
    of_all = ", its part by tokens" if record.trained_with else ""
    rows = [
        ("backbone", f"{record.backbone.source}, {record.backbone.quantization}, {record.backbone.dtype}"),
        ("its parameters", f"{record.backbone.num_parameters:,} in {_bytes(record.backbone.num_bytes)}"),
        ("its fingerprint", record.backbone.fingerprint),
        (
            "trainable parameters",
            f"{trainable.num_trainable:,} ({trainable.percentage:.3f} % of {trainable.num_total:,})",
        ),
        ("their bytes while training", _bytes(trainable.trainable_bytes)),
        ("steps", f"{len(record.curve):,} of {record.config.training.batch_size:,} examples"),
        ("tokens", f"{tokens:,}, of them {labels:,} learned from"),
        ("training time", f"{record.train_seconds:.1f} s"),
        ("time in all", f"{record.total_seconds:.1f} s"),
        ("speed", f"{tokens / record.train_seconds:,.0f} tokens/s"),
        ("model FLOPs utilisation", _utilization(record)),
        ("peak memory", _bytes(record.peak_memory_bytes)),
        (f"energy of the whole device while training{of_all}", "; ".join(energy) or NOT_READABLE),
    ]
    if record.num_ranks > 1:
        rows.append(("ranks", f"{record.num_ranks}, {record.config.parallel.strategy}"))
    return rows


def _trainable(facts: TrainableFacts) -> str:
    return f"{facts.num_trainable:,} ({facts.percentage:.3f} % of {facts.num_total:,})"


def _utilization(record: RunRecord) -> str:
    if record.mfu is None or record.peak_flops_per_s is None:
        return "not counted for this task or model"
    return (
        f"{record.mfu:.1%} of {record.peak_flops_per_s / 1e12:,.3f} TFLOP/s ({record.peak_flops_source}), without "
        "attention's own products"
    )


def _bytes(number: int) -> str:
    return f"{number:,} bytes ({number / 2**20:,.1f} MiB)"


def _data(record: RunRecord) -> list[tuple[str, str]]:
    config, facts = record.config.data, record.data
    # A stream is counted in examples before the run, and encoded as it is learned.
    tokens = "streamed" if facts.num_train_tokens is None else f"{facts.num_train_tokens:,} tokens"
    named = [("name", config.name), ("source", config.source), ("licence", config.license)]
    return [
        *((key, value) for key, value in named if value),
        ("examples to learn", f"{facts.num_train:,}, {tokens}"),
        ("examples held out", f"{facts.num_held_out:,}"),
        ("left out as too long", f"{facts.num_too_long:,}"),
        ("SHA-256 of the files", facts.sha256),
    ]
