"""`[[adapters]]`: several adapters in one file, each of them a whole run's configuration once the shared sections are
put under its own. Knows no torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from polyhead_core.errors import ConfigError
from polyhead_trainer.config.adapter import LoraSettings
from polyhead_trainer.config.base import Section
from polyhead_trainer.config.load import explain, override, parse_config, read_values
from polyhead_trainer.config.sections import RunConfig

OWN_SECTIONS = ("adapter", "data", "training", "evaluate")
SHARED_TRAINING = (
    "num_threads", "logit_chunk", "compile", "activation_checkpointing", "activation_checkpointing_every",
)  # fmt: skip
"""Settings of [training] that are about the passes, which all adapters share."""

LENGTHS = ("epochs", "max_steps")
"""Settings of [training] of which one's own replaces the other that is shared."""


class AdapterEntry(Section):
    """One `[[adapters]]`. Its sections hold what differs from the file's own [adapter], [data], [training] and
    [evaluate]."""

    name: str
    """Of the adapter: its directory is `<output>/<name>`."""
    title: str = ""
    """What the adapter does, in one line, for its model card."""
    adapter: dict[str, Any] = {}
    """As [adapter], method lora alone: rank, alpha, targets, layers, ..."""
    data: dict[str, Any] = {}
    """As [data]."""
    training: dict[str, Any] = {}
    """As [training]: steps, batch size, learning rate, optimizer, seed, ...; not what concerns the passes that all
    adapters share (num_threads, logit_chunk, activation_checkpointing)."""
    evaluate: dict[str, Any] = {}
    """As [evaluate]."""


@dataclass(frozen=True, kw_only=True)
class TogetherConfig:
    """Several runs that share the backbone and the passes over it."""

    output: Path
    """The folder of the adapters' directories."""
    runs: dict[str, RunConfig]
    """What each adapter's run of its own would be, by the adapter's name."""

    @property
    def shared(self) -> RunConfig:
        """Any of them: backbone, checkpoints and the passes' settings are the same in all."""
        return next(iter(self.runs.values()))


def load_run(file: Path, overrides: Sequence[str] = ()) -> RunConfig | TogetherConfig:
    """What `trainer run` can run. Raises ConfigError."""
    values = read_values(file)
    if "adapters" in values:
        return parse_together(values, str(file), overrides)
    return parse_config(values, str(file), overrides)


def known_entry_settings() -> dict[tuple[str, ...], FieldInfo]:
    return {("adapters", "<name>", name): field for name, field in AdapterEntry.model_fields.items()}


def parse_together(values: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> TogetherConfig:
    """`overrides` may name an adapter: `adapters.<name>.training.seed=1`. Raises ConfigError."""
    entries = values.pop("adapters")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{origin}: adapters: expected one [[adapters]] table or more")
    by_name = _by_name(entries, origin)
    for text in overrides:
        _override(values, by_name, text)
    checked = [_check(entry, f"{origin}: [[adapters]] {name}") for name, entry in by_name.items()]
    shared = {name: value for name, value in values.items() if name != "output"}
    if not isinstance(values.get("output"), str):
        raise ConfigError(f"{origin}: the setting output is missing: the folder of the adapters' directories")
    output = Path(values["output"])
    runs = {}
    for entry in checked:
        sections = {name: _put_under(shared.get(name, {}), getattr(entry, name)) for name in OWN_SECTIONS}
        own = {**shared, **sections, "title": entry.title, "output": str(output / entry.name)}
        where = f"{origin}: [[adapters]] {entry.name}"
        runs[entry.name] = parse_config(own, where)
        _check_possible(runs[entry.name], where)
    return TogetherConfig(output=output, runs=runs)


def _by_name(entries: Sequence[dict[str, Any]], origin: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(entries, start=1):
        name = entry.get("name")
        if not isinstance(name, str) or not name or name.startswith(".") or set(name) & set("/\\\0"):
            raise ConfigError(
                f"{origin}: [[adapters]] number {number}: name = {name!r}: expected the name of its directory, which "
                "has no slash and no dot in front"
            )
        if name in found:
            raise ConfigError(f"{origin}: two [[adapters]] have the name {name!r}: each needs a directory of its own")
        found[name] = entry
    return found


def _override(values: dict[str, Any], entries: dict[str, dict[str, Any]], text: str) -> None:
    path = text.partition("=")[0].strip()
    if not path.startswith("adapters."):
        override(values, text)
        return
    # A name may hold dots.
    rest = path.removeprefix("adapters.")
    for name in sorted(entries, key=len, reverse=True):
        if rest.startswith(f"{name}."):
            override(entries[name], rest.removeprefix(f"{name}.") + text[text.index(path) + len(path) :])
            return
    raise ConfigError(f"--set {text!r}: there is no such adapter; there are {', '.join(entries)}")


def _put_under(shared: Any, own: dict[str, Any]) -> Any:
    if not isinstance(shared, dict):  # what is wrong with it is said when the whole is checked
        return shared
    left_out = LENGTHS if set(LENGTHS) & set(own) else ()
    return {**{name: value for name, value in shared.items() if name not in left_out}, **own}


def _check(entry: dict[str, Any], where: str) -> AdapterEntry:
    for key in entry:
        if key not in AdapterEntry.model_fields:
            near = difflib.get_close_matches(key, AdapterEntry.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(AdapterEntry.model_fields)}"
            raise ConfigError(f"{where}: unknown setting {key}; {hint}")
    try:
        checked = AdapterEntry.model_validate(entry)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(explain(problem) for problem in error.errors())) from error
    for name in SHARED_TRAINING:
        if name in checked.training:
            raise ConfigError(f"{where}: training.{name} concerns passes that all adapters share: set it in [training]")
    return checked


def _check_possible(run: RunConfig, where: str) -> None:
    adapter, training = run.adapter, run.training
    problem = ""
    if not isinstance(adapter, LoraSettings):
        problem = f"adapter.method = {adapter.method}, where only lora (rsLoRA and LoRA+ included) can be"
    elif adapter.use_dora:
        problem = "adapter.use_dora = true, whose magnitudes need the backbone's weights in every pass"
    elif adapter.init in ("pissa", "olora"):
        problem = f"adapter.init = {adapter.init}, which takes its part out of the backbone that all share"
    elif adapter.bias != "none":
        problem = f"adapter.bias = {adapter.bias}, which trains biases of the backbone that all share"
    elif run.task != "completion":
        problem = f"task = {run.task}, where only completion can be"
    elif training.neftune_alpha:
        problem = "training.neftune_alpha, whose noise goes by the width of a padded batch"
    elif training.activation_checkpointing != "none" and adapter.dropout:
        problem = "training.activation_checkpointing with adapter.dropout, which would differ when computed again"
    elif run.tracking.mlflow or run.tracking.wandb:
        problem = "tracking.mlflow and tracking.wandb, which know one run at a time (TensorBoard is told of each)"
    if problem:
        raise ConfigError(f"{where}: not trained together with others: {problem}; give it a configuration of its own")
