"""Where Polyhead keeps what it can make again: converted backbones, built kernels, downloads."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """`$POLYHEAD_CACHE`, else `$XDG_CACHE_HOME/polyhead`, else `~/.cache/polyhead`."""
    if explicit := os.environ.get("POLYHEAD_CACHE"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "polyhead"
