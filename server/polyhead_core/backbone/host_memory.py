"""Keeps freed memory from staying with the process while a large model is converted or loaded."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_M_MMAP_THRESHOLD = -3
_CONVERTING_BYTES = 1 << 20
_SERVING_BYTES = 32 << 20
"""Where glibc's own adaptive threshold ends up once large blocks have been freed; it then adapts no longer."""


@contextlib.contextmanager
def large_blocks_apart() -> Iterator[None]:
    """glibc keeps freed blocks of up to 32 MiB in its heap, in pieces that come to as much as the model itself.

    Within this, blocks from 1 MiB on are the system's again when they are freed. Does nothing without glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _CONVERTING_BYTES)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _SERVING_BYTES)
