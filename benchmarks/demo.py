"""`make demo`: train two adapters on real data, serve them from one int8 backbone, ask each the same questions at once.

Everything goes through the commands and the client that a user has. Adapters of an earlier demo are kept where their
configuration, data and package versions are the same; it says so.
    python benchmarks/demo.py [--folder runs/demo] [--fresh]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from server_process import ServerProcess

import polyhead_trainer
from polyhead_client import Adapter, Client, Generation, ServerInfo
from polyhead_trainer.config import load_config
from polyhead_trainer.data import hash_sources
from polyhead_trainer.record import package_versions, read_record
from polyhead_trainer.report import FORMS

RECIPES = Path(polyhead_trainer.__file__).parent / "recipes"
TASKS = {"tweet-sentiment": "tweet_sentiment", "ui-spanish": "ui_spanish"}
"""Adapter names and the recipes that make them."""
QUESTIONS_PER_TASK = 3
MAX_TOKENS = 20


@dataclass(frozen=True)
class Question:
    prompt: str
    expected: str


def main() -> None:
    parser = argparse.ArgumentParser(description="Train two adapters, serve them from one backbone, ask each by name.")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where data and adapters are kept")
    parser.add_argument("--fresh", action="store_true", help="train again even where nothing has changed")
    options = parser.parse_args()
    console = Console(width=max(100, Console().width))
    began_s = time.monotonic()
    folder = options.folder.resolve()
    adapters = folder / "adapters"
    folder.mkdir(parents=True, exist_ok=True)

    console.rule("1. data")
    run_command(["polyhead_trainer", "demo-data", "data"], folder)
    console.rule("2. training")
    for name, recipe in TASKS.items():
        train(name, RECIPES / f"{recipe}.toml", folder, console, fresh=options.fresh)
    console.rule("3. serving")
    questions = [question for recipe in TASKS.values() for question in held_out(folder / "data" / recipe)]
    with ServerProcess(["--adapters", str(adapters)]) as server:
        for fact in server.facts:
            console.print(fact, highlight=False, soft_wrap=True)
        with Client(server.address) as client:
            for name in TASKS:
                client.load(
                    name
                )  # else the first requests for an adapter wait for it while the backbone's are answered
            before = server.sample()
            answers = ask_at_once(client, questions)
            after = server.sample()
            info, loaded = client.info(), client.adapters()
    console.print("the server drained after SIGTERM and ended with code 0")

    console.rule("4. result")
    console.print(answer_table(questions, answers))
    console.print(score_table({name: read_record(adapters / name) or {} for name in TASKS}))
    console.print(memory_table(info, loaded))
    print_sharing(console, answers, {key: after[key] - before.get(key, 0) for key in after})
    console.print(f"the demo took {time.monotonic() - began_s:.0f} s")


def run_command(module_and_arguments: Sequence[str], folder: Path) -> None:
    result = subprocess.run([sys.executable, "-m", *module_and_arguments], cwd=folder, check=False)
    if result.returncode != 0:
        raise SystemExit(result.returncode)


def train(name: str, recipe: Path, folder: Path, console: Console, *, fresh: bool) -> None:
    output = f"output=adapters/{name}"
    record = None if fresh else read_record(folder / "adapters" / name)
    if record is not None and is_current(record, recipe, output, folder):
        console.print(
            f"{name}: kept from an earlier demo; configuration, data and versions are the same (--fresh trains)"
        )
        return
    console.print(f"trainer run {recipe.name} --set {output}", style="bold")
    run_command(["polyhead_trainer", "run", str(recipe), "--set", output, "--overwrite"], folder)


def is_current(record: dict[str, Any], recipe: Path, output: str, folder: Path) -> bool:
    config = load_config(recipe, [output])
    files = [folder / file for file in (*config.data.train, *config.data.held_out)]
    return (
        record["config"] == config.model_dump(mode="json")
        and record["data"]["sha256"] == hash_sources(files)
        and record["versions"] == package_versions()
    )


def held_out(task: Path) -> list[Question]:
    """The last held-out examples: the ones that the trainer's report shows are the first."""
    lines = (task / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[-QUESTIONS_PER_TASK:]
    return [Question(record["prompt"], record["completion"].strip()) for record in map(json.loads, lines)]


def ask_at_once(client: Client, questions: Sequence[Question]) -> list[list[Generation]]:
    """Every question to the backbone and to each adapter, all of them in flight together."""
    askers: list[str | None] = [None, *TASKS]
    with ThreadPoolExecutor(len(questions) * len(askers)) as pool:
        calls = [
            [pool.submit(client.generate, item.prompt, adapter=asker, max_tokens=MAX_TOKENS) for asker in askers]
            for item in questions
        ]
        answers = [[call.result() for call in row] for row in calls]
    for row in answers:
        answered_by = [answer.adapter.name if answer.adapter else None for answer in row]
        if answered_by != askers:
            raise SystemExit(f"asked {askers}, answered by {answered_by}")
    return answers


def answer_table(questions: Sequence[Question], answers: Sequence[Sequence[Generation]]) -> Table:
    table = Table("prompt", "backbone", *TASKS, title="the same prompts, at once, to one server", show_lines=True)
    for item, row in zip(questions, answers, strict=True):
        cells = (f"{item.prompt}\n(held out; expected: {item.expected})", *(answer.text.strip() for answer in row))
        # Answers are other people's text: without escaping, brackets in them would be read as markup.
        table.add_row(*(cell.replace("[", "\\[") for cell in cells))
    return table


def score_table(records: dict[str, dict[str, Any]]) -> Table:
    table = Table("adapter", "measure", "backbone", "tuned", title="held-out examples, before and after training")
    for name, record in records.items():
        for field, (title, form) in FORMS.items():
            old, new = record["before"][field], record["after"][field]
            if old is not None and new is not None:
                table.add_row(name, title, format(old, form), format(new, form))
        table.add_section()
    return table


def memory_table(info: ServerInfo, adapters: Sequence[Adapter]) -> Table:
    table = Table("", "parameters", "bytes in memory", "bytes on disk", title="one backbone, many heads")
    backbone = info.backbone
    table.add_row(f"backbone ({backbone.quantization})", f"{backbone.num_parameters:,}", f"{backbone.num_bytes:,}", "")
    for adapter in adapters:
        table.add_row(
            adapter.name, f"{adapter.num_parameters:,}", f"{adapter.device_bytes:,}", f"{adapter.file_bytes:,}"
        )
    return table


def print_sharing(console: Console, answers: Sequence[Sequence[Generation]], growth: dict[str, float]) -> None:
    """What the server's metrics say of the batches; SystemExit where requests were not batched together."""
    num_requests = sum(len(row) for row in answers)
    num_tokens = sum(answer.usage.completion_tokens for row in answers for answer in row)
    steps, mixed = growth["polyhead_steps_total"], growth["polyhead_mixed_adapter_steps_total"]
    rows = growth["polyhead_batch_rows_sum"]
    distinct = growth["polyhead_batch_distinct_adapters_sum"]
    console.print(
        f"{num_requests} requests at once, {num_tokens} tokens in {steps:.0f} steps: on average {rows / steps:.1f} "
        f"sequences and {distinct / steps:.1f} different adapters (the backbone alone is one) in a step; "
        f"{mixed:.0f} steps ran several adapters together",
        highlight=False,
        soft_wrap=True,
    )
    if not mixed or rows <= steps:
        raise SystemExit("the requests did not share batches")


if __name__ == "__main__":
    main()
