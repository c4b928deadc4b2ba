"""What is asked: requests drawn from stated distributions by a seed, and random LoRA adapters to ask it of."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

RANKS = (4, 8, 16)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_B_SCALE = 0.1
"""Of peft's random values: the adapters change answers, and the model does not turn chaotic."""
_FIRST_ORDINARY_TOKEN = 256
"""Below it vocabularies keep their control tokens and single bytes."""


@dataclass(frozen=True, kw_only=True)
class LengthDistribution:
    """Log-normal, cut to a range."""

    median: int
    sigma: float
    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return min(self.high, max(self.low, round(rng.lognormvariate(math.log(self.median), self.sigma))))


PROMPT_TOKENS = LengthDistribution(median=48, sigma=0.6, low=8, high=192)
OUTPUT_TOKENS = LengthDistribution(median=24, sigma=0.5, low=8, high=64)
ZIPF_EXPONENT = 1.0


@dataclass(frozen=True, kw_only=True)
class Ask:
    prompt: tuple[int, ...]
    output_tokens: int
    """Exactly: end tokens are ignored."""
    adapter: str | None


def draw_asks(rng: random.Random, count: int, adapters: list[str], vocab_size: int) -> list[Ask]:
    """Requests whose adapters are Zipf-popular; prompts are random tokens, so that no prefix is shared."""
    weights = [1 / (place + 1) ** ZIPF_EXPONENT for place in range(len(adapters))]
    return [
        Ask(
            prompt=_draw_prompt(rng, vocab_size),
            output_tokens=OUTPUT_TOKENS.draw(rng),
            adapter=rng.choices(adapters, weights)[0] if adapters else None,
        )
        for _ in range(count)
    ]


def draw_batch(rng: random.Random, adapters: list[str], vocab_size: int, output_tokens: int) -> list[Ask]:
    """One request for each adapter, all of one output length: what suits a static batch best."""
    return [
        Ask(prompt=_draw_prompt(rng, vocab_size), output_tokens=output_tokens, adapter=adapter) for adapter in adapters
    ]


def _draw_prompt(rng: random.Random, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.randrange(_FIRST_ORDINARY_TOKEN, vocab_size) for _ in range(PROMPT_TOKENS.draw(rng)))


def write_adapters(folder: Path, backbone_directory: Path, count: int, seed: int) -> list[str]:
    """LoRA adapters by peft on every linear layer, ranks in turn from RANKS, A and B not zero. Returns the names."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(backbone_directory, dtype=torch.bfloat16)
    names = []
    for number in range(count):
        torch.manual_seed(seed * 1000 + number)
        rank = RANKS[number % len(RANKS)]
        # init_lora_weights=False draws B as well as A; a zero B would be an adapter without effect.
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        adapted = get_peft_model(model, config)
        for key, parameter in adapted.named_parameters():
            if ".lora_B." in key:
                parameter.data *= LORA_B_SCALE
        name = f"adapter{number:02d}"
        adapted.save_pretrained(folder / name, safe_serialization=True)
        model = adapted.unload()
        names.append(name)
    return names
