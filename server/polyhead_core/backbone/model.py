"""A loaded backbone: the frozen transformers tree, its tokenizer, its identity and its sites."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from polyhead_core.sites import Site, SiteKind, SiteMap


@dataclass(frozen=True, kw_only=True)
class Backbone:
    model: PreTrainedModel
    tokenizer: Any
    """A transformers fast tokenizer."""
    source: str
    """What the user named."""
    directory: Path
    """The Hugging Face directory that the weights came from, before quantisation."""
    fingerprint: str
    """Identity of the unquantised weights; see checkpoint.fingerprint."""
    quantization: str
    """`int8` or `none`."""
    dtype: torch.dtype
    """Of activations, and with quantization = none of the weights."""
    device: torch.device

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def vocab_size(self) -> int:
        embedding: Any = self.model.get_input_embeddings()
        return int(embedding.num_embeddings)

    @property
    def max_position_embeddings(self) -> int:
        return int(getattr(self.model.config, "max_position_embeddings", 2**31 - 1))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End tokens of the generation settings, the configuration and the tokenizer, together."""
        sources = (getattr(self.model, "generation_config", None), self.model.config, self.tokenizer)
        found: set[int] = set()
        for owner in sources:
            ids = getattr(owner, "eos_token_id", None)
            found.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
        return tuple(sorted(found))

    @cached_property
    def sites(self) -> SiteMap:
        return site_map(self.model)

    @cached_property
    def num_parameters(self) -> int:
        """Of the model that it stands for: a head tied to the embedding counts once, though int8 holds it twice."""
        tied = bool(getattr(self.model.config, "tie_word_embeddings", False))
        head = self.model.get_output_embeddings()
        head_parameters = {id(p) for p in head.parameters()} if tied and head is not None else set()
        embedding = self.model.get_input_embeddings().weight
        return sum(p.numel() for p in self.model.parameters() if p is embedding or id(p) not in head_parameters)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all weights and scales, each storage once."""
        return sum({t.untyped_storage().data_ptr(): t.nbytes for t in _tensors(self.model)}.values())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def site_map(model: PreTrainedModel) -> SiteMap:
    """The token embedding, every linear layer and every normalisation with a bias, in module order."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    sites: list[Site] = []
    for path, module in model.named_modules():
        if module is embedding and isinstance(module, nn.Embedding):
            kind, widths = SiteKind.EMBED, (module.num_embeddings, module.embedding_dim)
        elif isinstance(module, nn.Linear):
            kind, widths = SiteKind.LINEAR, (module.in_features, module.out_features)
        elif isinstance(module, nn.LayerNorm) and module.bias is not None:
            kind, widths = SiteKind.NORM, (module.normalized_shape[-1], module.normalized_shape[-1])
        else:
            continue
        sites.append(
            Site(
                index=len(sites),
                path=path,
                kind=kind,
                in_features=widths[0],
                out_features=widths[1],
                has_bias=getattr(module, "bias", None) is not None,
                is_head=module is head,
            )
        )
    return SiteMap(tuple(sites))
