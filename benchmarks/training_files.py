"""What the training benchmarks learn, and the file of results that they leave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from machine import shown

from polyhead_core.paths import default_cache_dir


def demo_data() -> Path:
    """The folder of the recipes' data, made where it is not there."""
    from polyhead_trainer.demo_data import prepare

    folder = default_cache_dir() / "demo_data"
    if not (folder / "tweet_sentiment").is_dir():
        prepare(folder)
    return folder


def write_results(out: Path, facts: dict[str, Any], settings: dict[str, Any], measured: Sequence[Any]) -> None:
    """`measured`: dataclasses."""
    out.parent.mkdir(parents=True, exist_ok=True)
    values = {"machine": facts, "settings": settings, "measured": [asdict(one) for one in measured]}
    out.write_text(json.dumps(values, indent=1) + "\n")
    print(f"\nwritten to {shown(out)}")
