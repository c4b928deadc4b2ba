"""Reads LoRA adapters for a tiny backbone.

Tests import the fixture `as` itself, which ruff takes for a use.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_making import TinyBackbone, llama

from polyhead_server.adapters.base import HostAdapter
from polyhead_server.adapters.registry import read_adapter
from polyhead_server.store.backbone_view import view_backbone

LM_HEAD = "base_model.model.lm_head"


@pytest.fixture(scope="module")
def backbone() -> TinyBackbone:
    return TinyBackbone(llama())


def read(directory: Path, backbone: TinyBackbone, *, max_rank: int = 64) -> HostAdapter:
    return read_adapter(directory, view_backbone(backbone), max_rank=max_rank, max_file_bytes=1 << 30)
