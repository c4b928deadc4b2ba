"""params.json of Meta's Llama checkpoints, checked, and its translation to and from transformers' LlamaConfig."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import LlamaConfig

from polyhead_trainer.convert.llama_layout import LlamaShape, feed_forward_width
from polyhead_trainer.errors import ConversionError

PARAMS_FILE = "params.json"

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What `use_scaled_rope` means in Meta's model code, the factor apart."""
ROPE_FACTOR = 8.0
TIED_ROPE_FACTOR = 32.0
"""Llama 3.2's small models, whose heads are tied, stretch four times further; params.json does not say so."""

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class LlamaParams(BaseModel):
    """Unknown keys are refused: those of other models (experts, images, quantisation) change what the weights mean."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    dim: int = Field(ge=1)
    n_layers: int = Field(ge=1)
    n_heads: int = Field(ge=1)
    n_kv_heads: int | None = Field(default=None, ge=1)
    vocab_size: int = -1
    multiple_of: int = Field(default=256, ge=1)
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False
    max_seq_len: int | None = None
    max_batch_size: int | None = None

    @property
    def feed_forward(self) -> int:
        return feed_forward_width(self.dim, self.multiple_of, self.ffn_dim_multiplier)

    @property
    def architecture(self) -> tuple[object, ...]:
        """Equal for two files that describe the same model."""
        kv_heads = self.n_kv_heads or self.n_heads
        sizes = (self.dim, self.n_layers, self.n_heads, kv_heads, self.feed_forward)
        return (*sizes, self.norm_eps, self.rope_theta, self.use_scaled_rope)

    def shape(self, vocabulary: int) -> LlamaShape:
        return LlamaShape(
            hidden=self.dim,
            num_layers=self.n_layers,
            num_heads=self.n_heads,
            num_kv_heads=self.n_kv_heads or self.n_heads,
            feed_forward=self.feed_forward,
            vocabulary=vocabulary,
        )


def read_params(file: Path) -> LlamaParams:
    """Raises ConversionError."""
    try:
        params = LlamaParams.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"cannot read {file}: {error}; expected Meta's params.json beside its weights") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'the file'}: {p['msg']}" for p in error.errors())
        raise ConversionError(
            f"{file} is not of a Llama model that is converted (1 to 3.2, text only): {problems}"
        ) from error
    kv_heads = params.n_kv_heads or params.n_heads
    if params.dim % (2 * params.n_heads) or params.n_heads % kv_heads:
        raise ConversionError(
            f"{file}: dim = {params.dim}, n_heads = {params.n_heads}, n_kv_heads = {kv_heads} do not fit together: "
            "expected heads of an even width, and n_heads a multiple of n_kv_heads"
        )
    return params


def config_of(
    params: LlamaParams,
    vocabulary: int,
    *,
    tied: bool,
    max_positions: int | None,
    rope_factor: float | None,
) -> LlamaConfig:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": params.rope_theta}
    if params.use_scaled_rope:
        factor = rope_factor or (TIED_ROPE_FACTOR if tied else ROPE_FACTOR)
        rope = {"rope_type": "llama3", "rope_theta": params.rope_theta, "factor": factor, **LLAMA3_ROPE}
    llama3 = vocabulary >= 128_256
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=params.dim,
        intermediate_size=params.feed_forward,
        num_hidden_layers=params.n_layers,
        num_attention_heads=params.n_heads,
        num_key_value_heads=params.n_kv_heads or params.n_heads,
        rms_norm_eps=params.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=max_positions or _max_positions(params),
        tie_word_embeddings=tied,
        bos_token_id=128_000 if llama3 else 1,
        eos_token_id=128_001 if llama3 else 2,
    )


def needed_options(config: LlamaConfig, params: LlamaParams, *, tied: bool) -> str:
    """What `--to huggingface` must be given to make this configuration of `params` again; empty: its guesses are right.

    `tied`: whether head and embedding are equal bit for bit.
    """
    guess = config_of(params, config.vocab_size, tied=tied, max_positions=None, rope_factor=None)
    options = []
    if params.use_scaled_rope and rope_factor_of(config) != rope_factor_of(guess):
        options.append(f"--rope-factor {rope_factor_of(config)}")
    if config.max_position_embeddings != guess.max_position_embeddings:
        options.append(f"--max-positions {config.max_position_embeddings}")
    return " ".join(options)


def lost_token_ids(config: LlamaConfig, params: LlamaParams) -> str:
    """The token ids of this configuration that `--to huggingface` will not make of `params` again, each with what it
    makes instead; empty: there are none."""
    guess = config_of(params, config.vocab_size, tied=False, max_positions=None, rope_factor=None)
    pairs = {name: (getattr(config, name), getattr(guess, name)) for name in TOKEN_IDS}
    return ", ".join(f"{name} = {own} (then {made})" for name, (own, made) in pairs.items() if own != made)


def rope_factor_of(config: LlamaConfig) -> float:
    """Of a configuration with scaled rope."""
    return float(dict(config.rope_parameters or {})["factor"])


def _max_positions(params: LlamaParams) -> int:
    """What the published models were trained for; params.json does not say it."""
    if params.use_scaled_rope:
        return 131_072
    by_theta = {10_000.0: 2048 if params.norm_eps == 1e-6 else 4096, 500_000.0: 8192, 1_000_000.0: 16_384}
    return by_theta.get(params.rope_theta, 4096)


def params_of(config: LlamaConfig) -> LlamaParams:
    """Raises ConversionError for what Meta's layout has no place for."""
    rope = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    problems = [
        f"{name} = {value!r}, expected {expected!r}"
        for name, value, expected in (
            ("model_type", config.model_type, "llama"),
            ("attention_bias", getattr(config, "attention_bias", False), False),
            ("mlp_bias", getattr(config, "mlp_bias", False), False),
            ("hidden_act", config.hidden_act, "silu"),
            ("head_dim", config.head_dim or config.hidden_size // config.num_attention_heads,
             config.hidden_size // config.num_attention_heads),
        )
        if value != expected
    ]  # fmt: skip
    if kind not in ("default", "llama3"):
        problems.append(f"rope_type = {kind!r}, expected 'default' or 'llama3'")
    if kind == "llama3" and {name: rope.get(name) for name in LLAMA3_ROPE} != LLAMA3_ROPE:
        problems.append(f"rope_parameters = {rope}, expected {LLAMA3_ROPE} for Meta's scaled rope")
    if problems:
        raise ConversionError(f"this model has no form in Meta's Llama layout: {'; '.join(problems)}")
    multiple_of, multiplier = _feed_forward_settings(config.hidden_size, config.intermediate_size)
    return LlamaParams(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        multiple_of=multiple_of,
        ffn_dim_multiplier=multiplier,
        norm_eps=config.rms_norm_eps,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        use_scaled_rope=kind == "llama3",
    )


def _feed_forward_settings(hidden: int, width: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) from which Meta's formula gives `width`."""
    multiple = next(size for size in (256, 128, 64, 32, 16, 8, 4, 2, 1) if width % size == 0)
    if feed_forward_width(hidden, multiple, None) == width:
        return multiple, None
    base = int(2 * 4 * hidden / 3)
    candidates = [round(width / base, 2), width / base, (width + 0.5) / base]
    multiplier = next(one for one in candidates if feed_forward_width(hidden, multiple, one) == width)
    return multiple, multiplier
