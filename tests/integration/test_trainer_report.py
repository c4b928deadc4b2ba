"""The report of a run: complete, in one file, and with other people's text in it as text."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from test_trainer_run import configuration, run_quietly, write_data

from local_engine import local_engine
from polyhead_core.adapter_directory import CONFIG_FILE, WEIGHTS_FILE, content_hash
from polyhead_trainer.html_report import render
from polyhead_trainer.plots import held_out_points, loss_curve, smoothed
from polyhead_trainer.report import print_outcome, print_plan
from polyhead_trainer.run import RunResult

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</td></table><iframe src=//example.org>",
    "{{ 7 * 7 }}{% raw %}",
    "<!-- &lt; &amp;lt; ]]>",
    "</title><style>body{display:none}</style>",
]
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "th", "td", "img"),
    *("details", "summary"),
}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "scope", "class", "dir", "alt", "src"}


MARKUP = [r"\[/INST\]", "[/INST]", "[bold]loud[/bold]", "[red", ":smile:", "ends in \\"]
"""What rich would refuse, or read as orders, or as pictures."""


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts = [""]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        self.texts[-1] += data


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run on hostile data, with a hostile title."""
    folder = tmp_path_factory.mktemp("hostile")
    write_data(folder)
    lines = [json.dumps({"prompt": f"{text} {number}", "completion": text}) for number, text in enumerate(HOSTILE)]
    (folder / "held_out.jsonl").write_text("\n".join(lines))
    config = configuration(folder, "training.evaluate_every=1", f"evaluate.generate_examples={len(HOSTILE)}")
    data = config.data.model_copy(update={"name": HOSTILE[1], "license": HOSTILE[2]})
    return run_quietly(config.model_copy(update={"title": HOSTILE[5], "data": data}))


def test_hostile_text_is_text(hostile: RunResult) -> None:
    page = Page((hostile.record.config.output / "report.html").read_text(encoding="utf-8"))
    assert set(page.tags) <= TAGS
    assert {name for name, _ in page.attributes} <= ATTRIBUTES
    assert page.tags.count("img") == page.tags.count("style") == 1
    for number, text in enumerate(HOSTILE):
        assert f"{text} {number}" in page.texts
        assert text in page.texts
    assert page.texts.count(HOSTILE[5]) >= 3, "as title of the page, of the text, and in a reference"
    # The answers of a model are as strange as it likes: here they are the worst.
    after = dataclasses.replace(hostile.record.after, answers=HOSTILE)
    page = Page(render(dataclasses.replace(hostile.record, after=after), b""))
    assert set(page.tags) <= TAGS
    assert all(page.texts.count(text) >= 2 for text in HOSTILE)
    assert page.attributes.count(("class", "text right")) == len(HOSTILE)


def test_the_console_shows_hostile_text_as_text(hostile: RunResult) -> None:
    record = hostile.record
    evaluate = record.config.evaluate.model_copy(update={"show": len(MARKUP)})
    config = record.config.model_copy(update={"title": MARKUP[0], "evaluate": evaluate})
    before, after = (dataclasses.replace(measures, answers=MARKUP) for measures in (record.before, record.after))
    record = dataclasses.replace(record, config=config, before=before, after=after, questions=MARKUP, references=MARKUP)
    console = Console(record=True, width=200)
    print_outcome(console, record)
    told = console.export_text()
    assert f"{MARKUP[0]}: before, after" in told
    for text in MARKUP[1:]:
        assert told.count(text) == 4, text

    backbone = dataclasses.replace(record.backbone, source="/[/INST]/:smile:")
    print_plan(console, config, backbone, record.data, record.trainable, num_steps=3)
    assert "/[/INST]/:smile:, int8" in console.export_text()


def test_nothing_is_loaded(hostile: RunResult) -> None:
    output = hostile.record.config.output
    page = Page((output / "report.html").read_text(encoding="utf-8"))
    sources = [value for name, value in page.attributes if name == "src"]
    head = "data:image/png;base64,"
    assert [source[: len(head)] for source in sources if source] == [head]
    picture = (output / "loss.png").read_bytes()
    assert base64.b64decode(str(sources[0])[len(head) :]) == picture
    assert picture.startswith(b"\x89PNG\r\n")
    policy = next(value for name, value in page.attributes if name == "content" and value and "default-src" in value)
    assert policy.startswith("default-src 'none'")


def test_the_report_says_what_was_measured(hostile: RunResult) -> None:
    record = hostile.record
    texts = Page((record.config.output / "report.html").read_text(encoding="utf-8")).texts
    for moment in (record.before, record.after):
        assert f"{moment.held_out_loss:.3f}" in texts
        assert f"{moment.general_perplexity:.2f}" in texts
        for answer in moment.answers:
            assert answer in texts
    tokens = sum(step.num_tokens for step in record.curve)
    for value in (
        f"{record.trainable.num_trainable:,} ({record.trainable.percentage:.3f} % of {record.trainable.num_total:,})",
        f"{tokens / record.train_seconds:,.0f} tokens/s",
        f"{record.peak_memory_bytes:,} bytes ({record.peak_memory_bytes / 2**20:,.1f} MiB)",
        f"{record.mfu:.1%} of {record.peak_flops_per_s / 1e12:,.3f} TFLOP/s ({record.peak_flops_source}), without "
        "attention's own products",
        record.data.sha256,
        record.backbone.fingerprint,
        "adapter.rank",
        "training.learning_rate",
        "energy of the whole device while training",
        *(f"{loss:.4f}" for _, loss in record.held_out_curve),
    ):
        assert value in texts, value
    assert [step for step, _ in record.held_out_curve] == [1, 2, 3]


def test_virtual_tokens_are_part_of_the_utilisation(tmp_path: Path) -> None:
    """18 examples in 3 steps, each with 5 tokens in front: 4 FLOPs a weight for each of them, and for every token."""
    record = run_quietly(configuration(tmp_path, "adapter={method = 'prompt_tuning', num_virtual_tokens = 5}")).record
    assert record.mfu is not None
    assert record.peak_flops_per_s is not None
    layers, head = 3 * 30_720, 64 * 288
    tokens = sum(step.num_tokens for step in record.curve) + 18 * 5
    labels = sum(step.num_labels for step in record.curve)
    seconds = sum(step.seconds for step in record.curve)
    assert record.mfu * record.peak_flops_per_s * seconds == pytest.approx(4 * (layers * tokens + head * labels))


def test_without_general_text_and_answers_the_report_says_so(hostile: RunResult) -> None:
    def without(measures: object) -> object:
        return dataclasses.replace(measures, general_perplexity=None, answers=[])  # type: ignore[type-var]

    record = dataclasses.replace(
        hostile.record,
        before=without(hostile.record.before),
        after=without(hostile.record.after),
        questions=[],
        references=[],
        energy_joules={},
    )
    texts = Page(render(record, b"")).texts
    assert any(text.startswith("Not measured: neither evaluate.general_text nor evaluate.earlier") for text in texts)
    assert "None were asked for: evaluate.generate_examples = 0." in texts
    assert "not readable" in texts
    counted = dataclasses.replace(record, energy_joules={"CPU package-0": 1234.4})
    assert "CPU package-0: 1,234 J" in Page(render(counted, b"")).texts


def test_both_measures_of_forgetting_are_told(hostile: RunResult) -> None:
    before, after = (
        dataclasses.replace(hostile.record.before, general_perplexity=perplexity, earlier_loss=loss)
        for perplexity, loss in ((20.0, 2.0), (30.0, 1.5))
    )
    texts = Page(render(dataclasses.replace(hostile.record, before=before, after=after), b"")).texts
    told = [text for text in texts if "by this measure" in text]
    assert told == [
        "Perplexity of general text, which was not learned: 20.00 before, 30.00 after (+50.0%): by this measure the "
        "run forgot.",
        "Loss (nats) on the data of earlier tasks: 2.00 before, 1.50 after (-25.0%): by this measure the run did not "
        "forget.",
    ]


def test_the_curve_starts_with_the_backbone_and_equal_curves_are_equal_files(hostile: RunResult) -> None:
    record = hostile.record
    assert held_out_points(record) == [(0, record.before.held_out_loss), *record.held_out_curve]
    alone = dataclasses.replace(record, held_out_curve=[])
    assert held_out_points(alone) == [(0, record.before.held_out_loss), (3, record.after.held_out_loss)]
    assert loss_curve(record) == loss_curve(record) != loss_curve(alone)
    assert smoothed([1.0, 2.0]) == pytest.approx([1.0, 1.1])


def test_the_server_is_not_disturbed(hostile: RunResult, tmp_path: Path) -> None:
    config = hostile.record.config
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copy(config.output / name, bare)
    assert content_hash(bare) == content_hash(config.output) == hostile.content_hash
    cache = config.backbone.cache_dir
    with local_engine(config.backbone.source, cache, adapters=config.output.parent) as local:
        assert local.store.resolve("colours").content_hash == hostile.content_hash
        before = local.submit("Colour of snow:", "colours", max_tokens=4).tokens()
        (config.output / "report.html").write_text("edited")
        local.store.refresh()
        assert local.store.resolve("colours").content_hash == hostile.content_hash
        assert local.submit("Colour of snow:", "colours", max_tokens=4).tokens() == before
