"""The run's report on the console: what is trained, and before and after side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyhead_trainer.config import RunConfig
from polyhead_trainer.record import BackboneFacts, DataFacts, RunRecord, TrainableFacts

if TYPE_CHECKING:
    from polyhead_trainer.evaluate import Measures
    from polyhead_trainer.profiling import OperatorTime

OPERATORS_SHOWN = 15
FORMS = {
    "held_out_loss": ("held-out loss (nats)", ".3f"),
    "accuracy": ("accuracy", ".1%"),
    "macro_f1": ("macro-F1", ".3f"),
    "preference_accuracy": ("preference accuracy", ".1%"),
    "reward_margin": ("reward margin", ".3f"),
    "chosen_likelier": ("chosen is the likelier", ".1%"),
    "earlier_loss": ("loss on earlier tasks (nats)", ".3f"),
    "choice_accuracy": ("choice accuracy", ".1%"),
    "exact_match": ("exact match of answers", ".1%"),
    "chrf": ("chrF of answers", ".1f"),
    "rouge_1": ("ROUGE-1 of answers", ".1f"),
    "rouge_2": ("ROUGE-2 of answers", ".1f"),
    "rouge_l": ("ROUGE-L of answers", ".1f"),
    "general_perplexity": ("general text, perplexity", ".2f"),
}
"""How the fields of Measures are titled and written."""


def say(console: Console, line: str) -> None:
    """One line as it is: of paths, names and data, neither [brackets] nor :colons: are markup."""
    console.print(Text(line), soft_wrap=True)


def comparison(before: Measures, after: Measures) -> list[tuple[str, str, str]]:
    """(measure, before, after) of everything that was measured."""
    rows = []
    for field, (title, form) in FORMS.items():
        old, new = getattr(before, field), getattr(after, field)
        if old is not None and new is not None:
            rows.append((title, format(old, form), format(new, form)))
    return rows


def print_plan(
    console: Console,
    config: RunConfig,
    backbone: BackboneFacts,
    data: DataFacts,
    trainable: TrainableFacts,
    num_steps: int,
) -> None:
    lines = [
        f"backbone   {backbone.source}, {backbone.quantization}, {backbone.dtype}: "
        f"{backbone.num_parameters:,} parameters in {backbone.num_bytes:,} bytes",
        f"adapter    {config.adapter.describe()}: {trainable.num_trainable:,} trainable of "
        f"{trainable.num_total:,} parameters ({trainable.percentage:.3f} %), {trainable.trainable_bytes:,} bytes",
        f"data       {data.num_train:,} examples to learn "
        + (f"({data.num_train_tokens:,} tokens), " if data.num_train_tokens is not None else "(streamed), ")
        + f"{data.num_held_out:,} held out"
        + (f", {data.num_too_long:,} left out as too long" if data.num_too_long else ""),
        f"training   {num_steps} steps of {config.training.batch_size} examples, learning rate "
        f"{config.training.learning_rate:g}",
    ]
    for line in lines:
        say(console, line)


def _rank_bytes(record: RunRecord, rank_bytes: dict[str, dict[str, int]]) -> Table:
    held, replica = rank_bytes["held"], rank_bytes["replica"]
    strategy = record.config.parallel.strategy
    table = Table("bytes", strategy, "a replica", title=f"held by one of {record.num_ranks} ranks")
    for name, num_bytes in held.items():
        table.add_row(name, f"{num_bytes:,}", f"{replica[name]:,}")
    return table


def print_outcome(console: Console, record: RunRecord) -> None:
    title = f"{record.config.title or record.config.output.name}: before, after"
    table = Table("measure", "backbone", "tuned", title=Text(title, style="table.title"))
    for row in comparison(record.before, record.after):
        table.add_row(*row)
    console.print(table)
    if record.operators:
        console.print(operators_table(record.operators))
        say(console, f"traces of the profiled steps: {record.config.output}.profile")
    if record.rank_bytes:
        console.print(_rank_bytes(record, record.rank_bytes))
    show = record.config.evaluate.show
    if show and record.questions:
        console.print(_answers(record, show))
    tokens = sum(report.num_tokens for report in record.curve)
    say(
        console,
        f"trained {len(record.curve)} steps, {tokens:,} tokens in {record.train_seconds:.0f} s "
        f"({tokens / record.train_seconds:.0f} tokens/s); {record.total_seconds:.0f} s in all; "
        f"peak memory {record.peak_memory_bytes:,} bytes",
    )


def operators_table(operators: Sequence[OperatorTime]) -> Table:
    table = Table("operator", "calls", "ms", "share", title="where the time of a profiled step goes")
    for one in operators[:OPERATORS_SHOWN]:
        table.add_row(one.name, f"{one.calls:g}", f"{one.seconds * 1000:.2f}", f"{one.share:.1%}")
    return table


def _answers(record: RunRecord, show: int) -> Table:
    table = Table("held-out question", "reference", "backbone", "tuned", title="answers", show_lines=True)
    rows = zip(record.questions, record.references, record.before.answers, record.after.answers, strict=True)
    for row in list(rows)[:show]:
        # Answers are other people's text: as plain strings, brackets in them would be read as markup.
        table.add_row(*(Text(text.strip()) for text in row))
    return table
