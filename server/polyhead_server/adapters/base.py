"""What every adapter type speaks: the backbone as a reader sees it, and the contributions that a reader hands back.

Contributions are plain host tensors at sites. Where they lie in device memory is the store's affair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from polyhead_core.adapter_directory import AdapterDirectory
from polyhead_core.sites import Site, SiteMap


@dataclass(frozen=True, kw_only=True)
class BackboneView:
    """What a reader may ask of the backbone that will serve the adapter."""

    sites: SiteMap
    fingerprint: str
    quantization: str
    base_bias: Callable[[str], Tensor | None]
    """The bias of the module at a path; None: no such module, or it has none."""
    same_weight: Callable[[str, Tensor], bool]
    """Whether the module at a path holds this weight, up to the rounding of the coarser of the two types."""
    embed_scale: Callable[[str], float]
    """By what an embedding multiplies its rows (Gemma); 1 for most."""


@dataclass(frozen=True, kw_only=True)
class LowRankDelta:
    """y += b (a x) at a linear site; y += b a[:, token] at the embedding."""

    site: Site
    rank: int
    a: Tensor  # [rank, in]; at the embedding [rank, vocab]
    b: Tensor  # [out, rank] float32, the adapter's scale already in it


@dataclass(frozen=True, kw_only=True)
class BiasDelta:
    """y += bias: what the adapter's bias differs by from the backbone's."""

    site: Site
    bias: Tensor  # [out] float32


Contribution = LowRankDelta | BiasDelta
"""At most one of each kind for a site."""


@dataclass(frozen=True, kw_only=True)
class HostAdapter:
    """A validated adapter in host memory."""

    content_hash: str
    peft_type: str
    max_rank: int
    num_parameters: int
    file_bytes: int
    contributions: tuple[Contribution, ...]

    @property
    def num_bytes(self) -> int:
        return sum(
            c.a.nbytes + c.b.nbytes if isinstance(c, LowRankDelta) else c.bias.nbytes for c in self.contributions
        )


class AdapterType(Protocol):
    """Adding a type: one module with one of these, one line in registry.py, one row in the parity table."""

    peft_type: str
    """As `adapter_config.json` names it."""

    def read(self, adapter: AdapterDirectory, backbone: BackboneView, *, max_rank: int) -> HostAdapter:
        """Checks every key and shape. Raises AdapterRejected or one of its subclasses."""
        ...
