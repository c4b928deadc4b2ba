"""The places in a backbone where an adapter may act. Backbones list them, adapter types refer to them; no torch."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field


class SiteKind(enum.Enum):
    LINEAR = "linear"
    """A linear layer: y[out] = W x[in] + b. `in_features` and `out_features` are its widths."""
    EMBED = "embed"
    """The token embedding: y[out] = E[token]. `in_features` is the vocabulary's size."""
    NORM = "norm"
    """A normalisation with a bias, which an adapter may change; both widths are the hidden one."""


@dataclass(frozen=True, kw_only=True)
class Site:
    index: int
    """Dense from 0: the row of this site in an adapter's page tables."""
    path: str
    """Module path in the backbone, as transformers names it: `model.layers.0.self_attn.q_proj`."""
    kind: SiteKind
    in_features: int
    out_features: int
    has_bias: bool = False
    is_head: bool = False
    """True for the language-model head, which sees only the rows that need logits."""


@dataclass(frozen=True)
class SiteMap:
    """All sites of one backbone, in the order of their indices."""

    sites: tuple[Site, ...]
    by_path: dict[str, Site] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_path", {site.path: site for site in self.sites})
        assert [site.index for site in self.sites] == list(range(len(self.sites))), "site indices must be dense"

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)
