"""The model card: README.md beside an adapter's two files."""

from __future__ import annotations

from collections.abc import Sequence

from polyhead_trainer.backbones import HUB_NAMES
from polyhead_trainer.record import RunRecord, package_versions
from polyhead_trainer.report import comparison

AUTO_CLASSES = {
    "completion": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
"""transformers' classes for the outputs of the tasks."""


def model_card(record: RunRecord) -> str:
    config, name = record.config, record.config.output.name
    base = HUB_NAMES.get(config.backbone.source, config.backbone.source)
    is_model = config.adapter.method == "full"
    sections = [
        f"---\nbase_model: {base}\nlibrary_name: {'transformers' if is_model else 'peft'}\n"
        f"tags:\n- {config.adapter.method}\n- polyhead\n---",
        f"# {config.title or name}",
        f"{base}, fine-tuned ({config.adapter.describe()}) by Polyhead's trainer."
        if is_model
        else f"An adapter ({config.adapter.describe()}) for {base}, made by Polyhead's trainer.",
        _data(record),
        "## Before and after\n\nOn the same held-out examples.\n\n"
        + _table(("measure", "backbone", "tuned"), comparison(record.before, record.after)),
        _cost(record),
        _use(record),
        "## Made with\n\n" + ", ".join(f"{package} {version}" for package, version in package_versions().items()) + ".",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _use(record: RunRecord) -> str:
    config, name = record.config, record.config.output.name
    if config.adapter.method == "head":
        return (
            "## Use\n\nThe head alone is here: `polyhead_trainer.heads.load_head(backbone, directory)` puts it on the "
            "backbone; the labels are in adapter_config.json, in the order of the scores."
        )
    if config.adapter.method == "full":
        return f"## Use\n\nThis is a whole model: `{AUTO_CLASSES[config.task]}.from_pretrained(directory)`."
    if config.task != "completion":
        return "## Use\n\nWith `peft.PeftModel.from_pretrained` on the backbone."
    return (
        '## Use\n\n```python\nfrom polyhead_client import Client\n\nwith Client("127.0.0.1:50051") as client:\n'
        f'    print(client.generate({_prompt(record)!r}, adapter="{name}", max_tokens='
        f"{config.evaluate.max_new_tokens}).text)\n```\n\nOr with `peft.PeftModel.from_pretrained` on the backbone."
    )


def _data(record: RunRecord) -> str:
    data, facts = record.config.data, record.data
    rows = [("name", data.name), ("source", data.source), ("licence", data.license)]
    rows = [(key, value) for key, value in rows if value]
    rows += [
        ("examples", f"{facts.num_train:,} learned, {facts.num_held_out:,} held out"),
        ("SHA-256", facts.sha256),
    ]
    return "## Data\n\n" + _table(("", ""), rows)


def _cost(record: RunRecord) -> str:
    rows = [
        ("trainable parameters", f"{record.trainable.num_trainable:,} ({record.trainable.percentage:.3f} %)"),
        ("their bytes while training", f"{record.trainable.trainable_bytes:,}"),
        ("backbone", f"{record.backbone.quantization}, {record.backbone.num_bytes:,} bytes"),
        ("backbone fingerprint", f"`{record.backbone.fingerprint}`"),
        ("steps", str(len(record.curve))),
        ("seconds of training", f"{record.train_seconds:.0f}"),
        ("peak memory in bytes", f"{record.peak_memory_bytes:,}"),
    ]
    return "## Cost\n\n" + _table(("", ""), rows)


def _prompt(record: RunRecord) -> str:
    return record.questions[0] if record.questions else "..."


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines: list[tuple[str, ...]] = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
