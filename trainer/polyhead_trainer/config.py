"""What one training run is: a TOML file, checked field by field. Knows no torch, reads nothing but that file."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from polyhead_core.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class BackboneSection(Section):
    source: str = "default"
    """`default` (SmolLM2-135M-Instruct), a Hugging Face directory, a .gguf file or a hub id."""
    quantization: Literal["int8", "llm.int8", "none"] = "int8"
    """`int8`: the very layers that the server runs; `llm.int8`: bitsandbytes' LLM.int8; `none`: weights in `dtype`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the activations, and of the weights with quantization = none; auto: float32 on the CPU, else bfloat16."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    cache_dir: Path | None = None
    """Where converted backbones are kept; unset: `$XDG_CACHE_HOME/polyhead` or `~/.cache/polyhead`."""


class AdapterSection(Section):
    method: Literal["lora"] = "lora"
    """The kind of adapter."""
    rank: Positive = 8
    """Rank of the update of each target."""
    alpha: Positive = 16
    """The update is scaled by alpha / rank (with use_rslora: alpha / sqrt(rank))."""
    dropout: Fraction = 0.0
    """Dropout on the input of the update, while training."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules to adapt (or one regular expression); `all-linear`: every linear layer but the LM head."""
    layers: list[Count] | None = None
    """Only these decoder layers; unset: all."""
    rank_pattern: dict[str, Positive] = {}
    """Other ranks for modules whose name matches."""
    alpha_pattern: dict[str, Positive] = {}
    """Other alphas for modules whose name matches."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which of the backbone's biases are trained and saved with the adapter."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023), which keeps large ranks learning."""
    save_embedding_layers: bool = False
    """Also save the whole embedding matrix: makes the adapter as large as the vocabulary, rarely wanted."""

    @model_validator(mode="after")
    def _layers_not_empty(self) -> AdapterSection:
        if self.layers == []:
            raise ValueError("layers = [] would mean all layers to peft; leave it out, or name some")
        return self


class DataSection(Section):
    train: list[Path]
    """JSONL files to learn from: {"prompt": ..., "completion": ...} or {"messages": [...]} on every line."""
    held_out: list[Path]
    """JSONL files to measure on, before and after. No example may be in both."""
    max_length: Positive = 512
    """Examples of more tokens are left out, and counted."""
    name: str = ""
    """The data's name, for the model card."""
    source: str = ""
    """Where the data comes from, for the model card."""
    license: str = ""
    """The data's licence, for the model card."""


class TrainingSection(Section):
    epochs: Positive | None = None
    """Passes over the data; exactly one of epochs and max_steps."""
    max_steps: Positive | None = None
    """Optimizer steps, over as many passes as they take."""
    batch_size: Positive = 16
    """Examples per optimizer step."""
    micro_batch_size: Positive | None = None
    """Most examples in one forward pass; unset: batch_size. Smaller saves memory and changes no result."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up, to 0 (constant: not at all)."""
    warmup: Fraction = 0.1
    """Share of the steps over which the learning rate rises linearly."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    seed: Count = 0
    """Of the adapter's initial weights, the dropout and the order of the data."""
    num_threads: Count = 0
    """Compute threads; 0: as torch chooses."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("exactly one of epochs and max_steps must be set")
        return self


class EvaluateSection(Section):
    max_examples: Count = 200
    """Held-out examples whose loss is measured; 0: all."""
    generate_examples: Count = 32
    """Held-out examples that are answered, greedily, by the backbone and by the tuned model."""
    max_new_tokens: Positive = 32
    """Length limit of those answers."""
    choices: list[str] = []
    """For classification: every possible completion. Measures how often the right one is the most likely of them,
    which is fair to a backbone that does not know the form of the answer. Their first tokens must differ."""
    general_text: Path | None = None
    """A text of another kind: its perplexity before and after shows what was forgotten."""
    general_tokens: Positive = 4096
    """How many of its tokens are used."""
    show: Count = 4
    """How many answers are printed side by side."""


class RunConfig(Section):
    output: Path
    """The adapter's directory. It appears only when the run is complete."""
    title: str = ""
    """What the adapter does, in one line, for the model card."""
    backbone: BackboneSection = BackboneSection()
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    training: TrainingSection
    evaluate: EvaluateSection = EvaluateSection()


def load_config(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings in `file` with `section.key=value` texts on top; values are TOML, bare words are strings.

    Raises ConfigError. Relative paths are relative to the working directory.
    """
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {file}: {error}") from error
    return parse_config(values, origin=str(file), overrides=overrides)


def parse_config(values: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> RunConfig:
    for text in overrides:
        _override(values, text)
    try:
        # Through JSON, because strict validation turns texts into paths only there.
        return RunConfig.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + "; ".join(_explain(problem) for problem in error.errors())) from error


def _override(values: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set {text!r}: expected section.key=value")
    *sections, name = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {text!r}: {section} is a value, not a section")
    try:
        values[name] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        values[name] = value.strip()


def _explain(problem: ErrorDetails) -> str:
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {name}{_nearest(path)}"
    if problem["type"] == "missing":
        return f"the setting {name} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return (
        f"{name} = {problem['input']!r}: {message}" if not isinstance(problem["input"], dict) else f"{name}: {message}"
    )


def _nearest(path: list[str]) -> str:
    known = {".".join(key): key for key in known_settings()}
    same_name = [name for name, key in known.items() if key[-1] == path[-1]]
    near = same_name or difflib.get_close_matches(".".join(path), known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def known_settings() -> dict[tuple[str, ...], FieldInfo]:
    """Every setting by its path, sections first opened in the order in which they are declared."""
    found: dict[tuple[str, ...], FieldInfo] = {}
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            found.update({(name, inner): inner_field for inner, inner_field in section.model_fields.items()})
        else:
            found[(name,)] = field
    return found
