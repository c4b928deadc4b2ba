"""Several examples in one row without padding, none of which sees another (padding-free packing).

transformers hands attention over to a registered function; ours runs each example of a packed row by itself. The
alternative, a block-diagonal mask over the row, is as exact, but computes the products between examples in order to
throw them away. Everything else in a decoder treats tokens one by one, and where it does not (Mamba's state, ALiBi made
from whole rows, positions counted by the model itself), packed examples would leak into each other without a sound. So
each run compares packed logits with separate ones before it packs.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from polyhead_core.errors import ConfigError
from polyhead_trainer.batching import collate, pack
from polyhead_trainer.data import EncodedExample
from polyhead_trainer.objectives.label_logits import label_logits
from polyhead_trainer.parallel import without_backward

IMPLEMENTATION = "polyhead_packed"
ROUNDING = 1e-3
"""Difference between packed and separate logits, as a share of their spread, that float32 explains."""
COARSE_ROUNDING = 0.05
"""The same on int8 layers, or of weights alone in 16 bits; and what of a leak LLM.int8 explains."""
NARROW_ROUNDING = 0.1
"""The same of activations in 16 bits: 0.03 to 0.053 with the default backbone, and 0.46 to 0.67 without a mask."""
SAME_NOISE = 3
"""How much more packing may change than padding both examples to one batch does: deep models magnify rounding."""
QUICKER_IN_FLOAT32 = 192
"""Tokens of an example up to which torch's attention on a CPU goes backward faster in float32 than in bfloat16: 5 times
at 16 tokens, 2 times at 128, 1.1 times at 192 (torch 2.13, Zen 5)."""
OUTSIDE_SCOPE = ("softcap", "s_aux", "position_bias")
"""Arguments by which a model asks for another attention than softmax(q k) v."""


def prepare_packing(model: nn.Module, examples: Iterable[EncodedExample], pad_id: int) -> None:
    """Makes `model` take packed batches besides padded ones. Raises ConfigError where packing would not be exact.

    The two longest of `examples` are tried, so that sliding windows act wherever these reach them.
    """
    _refuse_virtual_tokens(model)
    backbone = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    found = backbone.config._attn_implementation
    if found not in ("sdpa", IMPLEMENTATION):
        raise _refusal(backbone, f"it computes attention by {found!r}, and packing is made for 'sdpa'")
    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    backbone.set_attn_implementation(IMPLEMENTATION)
    was_training = model.training
    model.eval()
    try:
        first, second = _two_longest(examples)
        with without_backward(model):
            changed, padded = _changes(model, first, second, pad_id)
            rounding = max(_rounding(model), SAME_NOISE * padded)
            leaked = _leak(model, first, second)
        # Bit-equal without a leak, whatever the type: the same shapes go through the same kernels. But LLM.int8
        # chooses its outlier columns over all tokens of a forward pass, padded or packed.
        allowed = COARSE_ROUNDING if getattr(backbone, "is_loaded_in_8bit", False) else 1e-6
    except (TypeError, ValueError) as error:
        backbone.set_attn_implementation(found)
        raise _refusal(backbone, str(error)) from error
    finally:
        model.train(was_training)
    if changed <= rounding and leaked <= allowed:
        return
    backbone.set_attn_implementation(found)
    raise _refusal(
        backbone,
        f"packed, two examples give other logits than apart ({changed:.2g} of their spread; rounding explains "
        f"{rounding:g}), and other tokens in the first change the second's by {leaked:.2g}",
    )


def _rounding(model: nn.Module) -> float:
    tensors = list(model.state_dict().values())
    # Norms have the type of the activations.
    in_16_bits = any(tensor.dim() == 1 and tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors)
    # Shards may be gathered and computed with in another type than they are kept in.
    if in_16_bits or any(isinstance(tensor, DTensor) for tensor in tensors):
        return NARROW_ROUNDING
    return COARSE_ROUNDING if any(tensor.dtype != torch.float32 for tensor in tensors if tensor.dim() > 1) else ROUNDING


def _two_longest(examples: Iterable[EncodedExample]) -> tuple[EncodedExample, EncodedExample]:
    longest = heapq.nlargest(2, examples, key=len)
    return longest[0], longest[-1]


def _changes(model: nn.Module, first: EncodedExample, second: EncodedExample, pad_id: int) -> tuple[float, float]:
    """How far the label logits of the two are from each one's own: packed, and padded to one batch."""
    device = next(model.parameters()).device
    batches = [pack([first, second]), *(collate(some, pad_id) for some in ([first, second], [first], [second]))]
    packed_NV, padded_NV, *apart = (label_logits(model, batch.to(device)) for batch in batches)
    apart_NV = torch.cat(apart)
    return _share_of_spread(packed_NV - apart_NV, apart_NV), _share_of_spread(padded_NV - apart_NV, apart_NV)


def _leak(model: nn.Module, first: EncodedExample, second: EncodedExample) -> float:
    """What other tokens in `first` change in the label logits of `second` behind it."""
    device = next(model.parameters()).device
    before = pack([first, second]).to(device)
    token_ids_1T = before.token_ids_BT.clone()
    token_ids_1T[:, : len(first)] = token_ids_1T[:, : len(first)].roll(1, dims=1)
    after = replace(before, token_ids_BT=token_ids_1T)
    one_NV, other_NV = (label_logits(model, batch)[first.num_labels :] for batch in (before, after))
    return _share_of_spread(other_NV - one_NV, one_NV)


def _share_of_spread(difference_NV: Tensor, logits_NV: Tensor) -> float:
    return (difference_NV.square().mean().sqrt() / logits_NV.std()).item()


def _refuse_virtual_tokens(model: nn.Module) -> None:
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        method = model.active_peft_config.peft_type
        raise ConfigError(
            f"training.packing = true: {getattr(method, 'value', method)} puts its virtual tokens before a row, and of "
            "packed examples only the first would see them; set training.packing = false"
        )


def _refusal(backbone: PreTrainedModel, reason: str) -> ConfigError:
    return ConfigError(
        f"training.packing = true cannot be used with {backbone.config.model_type}: {reason}; set "
        "training.packing = false"
    )


def packed_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    example_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each run of `example_lengths` tokens to itself; without lengths transformers' own SDPA.

    H query heads share G key heads. Returns [B, T, H, D]. Called by transformers (AttentionInterface).
    """
    if example_lengths is None:
        return sdpa_attention_forward(
            module, query_BHTD, key_BGTD, value_BGTD, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    asked = [name for name in OUTSIDE_SCOPE if kwargs.get(name) is not None]
    if asked:
        raise ValueError(f"its attention needs {', '.join(asked)}")
    lengths = list(example_lengths)
    parts = [
        _causal(query, key, value, kwargs.get("sliding_window"), dropout, scaling)
        for query, key, value in zip(
            query_BHTD.split(lengths, dim=2),
            key_BGTD.split(lengths, dim=2),
            value_BGTD.split(lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _causal(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, dropout: float, scaling: float | None
) -> Tensor:
    num_tokens = query.shape[2]
    mask_TT = None
    if window is not None and num_tokens > window:
        ones_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=query.device)
        mask_TT = ones_TT.tril() & ones_TT.triu(1 - window)
    dtype = query.dtype
    if query.device.type == "cpu" and num_tokens <= QUICKER_IN_FLOAT32:
        query, key, value = query.float(), key.float(), value.float()
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask_TT,
        dropout_p=dropout,
        is_causal=mask_TT is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    ).to(dtype)
