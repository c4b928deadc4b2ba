"""[adapter]: one class of settings per method, told apart by `method`. A new method: its class, its line in METHODS."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from polyhead_trainer.config.base import Count, Fraction, Positive, Section

DEFAULT_METHOD = "lora"

REFUSED_METHODS = {
    "hra": "on an int8 backbone its reflections multiply raw int8 values, silently wrong; use lora or bottleneck",
    "oft": "it rotates the backbone's weights, which int8 cannot take; use lora or dora",
    "boft": "it rotates the backbone's weights, which int8 cannot take; use lora or dora",
    "pissa": "it is an initialisation: set adapter.method = lora and adapter.init = pissa",
    "olora": "it is an initialisation: set adapter.method = lora and adapter.init = olora",
    "dora": "it is a form of lora: set adapter.method = lora and adapter.use_dora = true",
    "rslora": "it is a form of lora: set adapter.method = lora and adapter.use_rslora = true",
}
"""Names that people ask for, and what to do instead."""


class AdapterSection(Section):
    """What all adapters share; a whole model has none of it."""

    warm_start: Path | None = None
    """Directory of a finished adapter of the same form whose weights training starts from."""


class LoraSettings(AdapterSection):
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
    use_dora: bool = False
    """Learn each output's magnitude apart from its direction (Liu et al. 2024)."""
    init: Literal["default", "gaussian", "pissa", "olora"] = "default"
    """Initial weights: `default` and `gaussian` start from no change; `pissa` (Meng et al. 2024) and `olora`
    (Büyükakyüz 2024) from the backbone's own directions, need backbone.quantization = none, and are saved as plain LoRA
    of twice the rank."""
    lora_plus_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024, who advise 16); 1: the same."""
    save_embedding_layers: bool = False
    """Also save the whole embedding matrix: makes the adapter as large as the vocabulary, rarely wanted."""

    @model_validator(mode="after")
    def _layers_not_empty(self) -> LoraSettings:
        if self.layers == []:
            raise ValueError("layers = [] would mean all layers to peft; leave it out, or name some")
        return self

    @model_validator(mode="after")
    def _combinations(self) -> LoraSettings:
        if self.init in ("pissa", "olora") and (self.use_dora or self.warm_start is not None):
            raise ValueError(f"init = {self.init} goes with neither use_dora nor warm_start")
        if self.init in ("pissa", "olora") and self.bias != "none":
            raise ValueError(f"init = {self.init} goes with bias = none alone: peft cannot save it as plain LoRA else")
        if self.init in ("pissa", "olora") and self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            raise ValueError(
                f"init = {self.init} with use_rslora goes with neither rank_pattern nor alpha_pattern: peft cannot "
                "save it as plain LoRA then"
            )
        if self.bias != "none" and self.warm_start is not None:
            raise ValueError(
                f"bias = {self.bias} goes without warm_start: the biases that it brings stay on when the adapter is "
                "switched off, and nothing could be compared with the backbone"
            )
        return self

    def describe(self) -> str:
        form = "DoRA" if self.use_dora else "rsLoRA" if self.use_rslora else "lora"
        return f"{form}, rank {self.rank}"


class Ia3Settings(AdapterSection):
    method: Literal["ia3"]
    """Learned scales of keys, values and the feed-forward's inner activations (Liu et al. 2022)."""
    target_modules: list[str] | None = None
    """Names of the modules whose output, or input, is scaled; unset: peft's choice for the architecture."""
    feedforward_modules: list[str] | None = None
    """Those of them whose input is scaled."""

    @model_validator(mode="after")
    def _both_or_none(self) -> Ia3Settings:
        if (self.target_modules is None) != (self.feedforward_modules is None):
            raise ValueError("target_modules and feedforward_modules are set together, or neither")
        return self

    def describe(self) -> str:
        return "(IA)3"


class LnTuningSettings(AdapterSection):
    method: Literal["ln_tuning"]
    """The scales of the normalisations are trained (Zhao et al. 2024)."""
    target_modules: list[str] | None = None
    """Names of the normalisations; unset: every one."""

    def describe(self) -> str:
        return "scales of normalisations"


class PrefixSettings(AdapterSection):
    method: Literal["prefix_tuning"]
    """Learned keys and values in front of every layer's own (Li and Liang 2021)."""
    num_virtual_tokens: Positive = 16
    """Positions in front of the prompt."""
    init_text: str | None = None
    """Start from the keys and values of this text's tokens, repeated or cut to num_virtual_tokens; unset: from those
    of the backbone's own first tokens of the vocabulary, drawn by the seed."""

    def describe(self) -> str:
        return f"prefix tuning, {self.num_virtual_tokens} virtual tokens"


class PromptSettings(AdapterSection):
    method: Literal["prompt_tuning"]
    """Learned embeddings in front of the prompt (Lester et al. 2021)."""
    num_virtual_tokens: Positive = 16
    """Positions in front of the prompt."""
    init_text: str | None = None
    """Start from the embeddings of this text's tokens, repeated or cut to num_virtual_tokens; unset: from tokens
    drawn from the vocabulary by the seed."""

    def describe(self) -> str:
        return f"prompt tuning, {self.num_virtual_tokens} virtual tokens"


class PTuningSettings(AdapterSection):
    method: Literal["p_tuning"]
    """As prompt tuning, with an encoder that makes the embeddings while training and is folded at save (Liu et al.
    2021)."""
    num_virtual_tokens: Positive = 16
    """Positions in front of the prompt."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """What makes the embeddings."""
    encoder_hidden_size: Positive = 128
    """Its width."""

    def describe(self) -> str:
        return f"P-tuning, {self.num_virtual_tokens} virtual tokens"


class LlamaAdapterSettings(AdapterSection):
    method: Literal["llama_adapter"]
    """Learned prompts that the top layers attend to through a gate that starts at zero (Zhang et al. 2023)."""
    adapter_len: Positive = 10
    """Prompt tokens of each adapted layer."""
    adapter_layers: Positive | None = None
    """How many layers from the top; unset: all but the two lowest, as in the paper (30 of 32)."""

    def describe(self) -> str:
        return f"LLaMA-Adapter, {self.adapter_len} prompt tokens a layer"


class BottleneckSettings(AdapterSection):
    method: Literal["bottleneck"]
    """Small two-layer networks inside the decoder layers (Houlsby et al. 2019)."""
    size: Positive = 32
    """Width of the bottleneck."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Between the two layers."""
    places: Literal["feed_forward", "both"] = "feed_forward"
    """After the feed-forward part (Pfeiffer et al. 2021), or after the attention as well (Houlsby et al. 2019)."""

    def describe(self) -> str:
        return f"bottleneck adapters of width {self.size}"


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


METHODS: dict[str, type[Section]] = {
    "lora": LoraSettings,
    "ia3": Ia3Settings,
    "ln_tuning": LnTuningSettings,
    "prefix_tuning": PrefixSettings,
    "prompt_tuning": PromptSettings,
    "p_tuning": PTuningSettings,
    "llama_adapter": LlamaAdapterSettings,
    "bottleneck": BottleneckSettings,
    "full": FullSettings,
    "head": HeadSettings,
}


def _method(values: Any) -> str:
    if isinstance(values, dict):
        return str(values.get("method", DEFAULT_METHOD))
    return str(getattr(values, "method", DEFAULT_METHOD))


AdapterSettings = Annotated[
    Annotated[LoraSettings, Tag("lora")]
    | Annotated[Ia3Settings, Tag("ia3")]
    | Annotated[LnTuningSettings, Tag("ln_tuning")]
    | Annotated[PrefixSettings, Tag("prefix_tuning")]
    | Annotated[PromptSettings, Tag("prompt_tuning")]
    | Annotated[PTuningSettings, Tag("p_tuning")]
    | Annotated[LlamaAdapterSettings, Tag("llama_adapter")]
    | Annotated[BottleneckSettings, Tag("bottleneck")]
    | Annotated[FullSettings, Tag("full")]
    | Annotated[HeadSettings, Tag("head")],
    Discriminator(
        _method,
        custom_error_type="unknown_method",
        custom_error_message=f"unknown method; known are {', '.join(METHODS)}",
    ),
]
