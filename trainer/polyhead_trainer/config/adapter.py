"""[adapter]: one class of settings per method, told apart by `method`. A new method: its class, its line in METHODS."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, model_validator

from polyhead_trainer.config.base import Count, Fraction, Positive, Section

DEFAULT_METHOD = "lora"


class LoraSettings(Section):
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
    def _layers_not_empty(self) -> LoraSettings:
        if self.layers == []:
            raise ValueError("layers = [] would mean all layers to peft; leave it out, or name some")
        return self

    def describe(self) -> str:
        return f"{self.method}, rank {self.rank}"


class FullSettings(Section):
    method: Literal["full"]
    """The backbone's own weights are trained; the output is a whole model. Needs backbone.quantization = none."""
    last_layers: Positive | None = None
    """Only this many of the last decoder layers and the final norm (and a classifier's scores); unset: every weight."""

    def describe(self) -> str:
        return "every weight" if self.last_layers is None else f"the last {self.last_layers} layers and the final norm"


class HeadSettings(Section):
    method: Literal["head"]
    """A classification head on the frozen backbone, which reads the last token's hidden state."""
    hidden: list[Positive] = []
    """Widths of fully connected layers added between the backbone and the scores; empty: a linear head."""

    def describe(self) -> str:
        return "head" + "".join(f", added layer of {width}" for width in self.hidden)


METHODS: dict[str, type[LoraSettings] | type[FullSettings] | type[HeadSettings]] = {
    "lora": LoraSettings,
    "full": FullSettings,
    "head": HeadSettings,
}


def _method(values: Any) -> str:
    return str(values.get("method", DEFAULT_METHOD) if isinstance(values, dict) else values.method)


AdapterSettings = Annotated[
    Annotated[LoraSettings, Tag("lora")] | Annotated[FullSettings, Tag("full")] | Annotated[HeadSettings, Tag("head")],
    Discriminator(
        _method,
        custom_error_type="unknown_method",
        custom_error_message=f"unknown method; known are {', '.join(METHODS)}",
    ),
]
