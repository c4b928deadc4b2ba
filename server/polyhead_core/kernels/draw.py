"""What one token is drawn by."""

from __future__ import annotations

from typing import NamedTuple


class Draw(NamedTuple):
    """The filters are applied in this order, each to what the one before left."""

    temperature: float
    """More than 0, in float32."""
    top_k: int
    """Of equal logits the lower ids are kept, here and by top_p; 0: off."""
    top_p: float
    """1: off."""
    min_p: float
    """Of the likeliest token's weight; 0: off."""
    uniform: float
    """From [0, 1): how far along the weights of what is left, by ascending ids, the token is taken."""
