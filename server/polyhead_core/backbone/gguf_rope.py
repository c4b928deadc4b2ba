"""Scaling of rotary positions in GGUF files, which transformers' reader drops without a word: taken over or refused.

D: rotary frequencies of a head.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from polyhead_core.errors import BackboneError

ROPE_FREQS = "rope_freqs.weight"
"""Llama 3.1 and later: by what each frequency is divided."""

_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Of Llama 3.1 to 3.3 alike; the factor, 8 or 32, is the file's largest divisor."""

_KEY = re.compile(r".*\.rope\.(?:scaling\.|scale_)(\w+)")
_WITHOUT_EFFECT = {"type": ("none", "linear"), "factor": (1.0,), "linear": (1.0,), "attn_factor": (1.0,)}
_WITHOUT_EFFECT_ALONE = ("finetuned", "original_context_length")


def take_rope_scaling(reader: GGUFReader, config: PreTrainedConfig, gguf: Path) -> None:
    """Puts Llama 3's scaling, where the file has it, into `config`. Raises BackboneError for every other."""
    for key, field in reader.fields.items():
        found = _KEY.fullmatch(key)
        if found is None or found[1] in _WITHOUT_EFFECT_ALONE:
            continue
        if field.contents() not in _WITHOUT_EFFECT.get(found[1], ()):
            raise _refusal(gguf, f"{key} = {field.contents()}")
    for tensor in reader.tensors:
        if tensor.name == ROPE_FREQS:
            divisors_D = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
            if not torch.equal(divisors_D, torch.ones_like(divisors_D)):
                config.rope_parameters = _llama3_rope(config, divisors_D, gguf)


def _llama3_rope(config: PreTrainedConfig, divisors_D: Tensor, gguf: Path) -> dict[str, object]:
    """The rope_parameters that divide by these: guessed, then checked against what transformers makes of them."""
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if theta is None:
        raise _refusal(gguf, f"{ROPE_FREQS}, beside no rope_theta")
    scaled = copy.deepcopy(config)
    scaled.rope_parameters = {**config.rope_parameters, **_LLAMA3, "factor": float(divisors_D.max())}
    frequencies_D, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    exponents_D = torch.arange(len(frequencies_D)) / len(frequencies_D)
    made_D = theta**-exponents_D / frequencies_D
    if made_D.shape != divisors_D.shape or not torch.allclose(made_D, divisors_D, rtol=1e-5, atol=0.0):
        raise _refusal(gguf, f"{ROPE_FREQS}, whose divisors are not those of Llama 3.1 to 3.3")
    return dict(scaled.rope_parameters)


def _refusal(gguf: Path, what: str) -> BackboneError:
    return BackboneError(
        f"{gguf} scales rotary positions in a way that is not converted ({what}): give the model's Hugging Face "
        "directory instead"
    )
