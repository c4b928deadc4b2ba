"""Finds the kernels of the CUDA path on first use; without triton, the torch reference runs, after one warning."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

logger = logging.getLogger(__name__)


@cache
def load() -> Any | None:
    """The module `polyhead_core.kernels.triton.entry`, or None where triton is not installed."""
    if find_spec("triton") is None:
        logger.warning(
            "triton is not installed, so on CUDA the reference runs instead: loops over rows in Python for "
            "adapters and attention, and no CUDA graph can hold them; install triton (CUDA builds of torch bring it)"
        )
        return None
    from polyhead_core.kernels.triton import entry

    return entry
