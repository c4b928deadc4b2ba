"""A float checkpoint in another type, made once: its tensors are pages of files, which processes of a host share."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from polyhead_core.backbone.checkpoint import INDEX_FILE, CheckpointReader
from polyhead_core.backbone.source import publish_directory, staging_directory

logger = logging.getLogger(__name__)

FILE_BYTES = 512 << 20
"""Of tensors in one file, which are held in memory until it is written."""


def typed_directory(directory: Path, fingerprint: str, dtype: torch.dtype, cache_dir: Path) -> Path:
    """The directory itself where its float tensors are all of this type, else a cached copy of them in it.

    Peak host memory is FILE_BYTES, or the largest tensor.
    """
    reader = CheckpointReader(directory)
    if all(_is_of(reader.read(name), dtype) for name in reader.names):
        return directory
    target = cache_dir / "typed" / f"{fingerprint[:24]}-{str(dtype).removeprefix('torch.')}"
    if (target / INDEX_FILE).is_file():
        return target
    logger.info("copying %s in %s (once)", directory, dtype)
    with staging_directory(target) as staging:
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(_files(reader, dtype)):
            file = f"model-{number:05}.safetensors"
            save_file(tensors, staging / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        (staging / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
        publish_directory(staging, target)
    return target


def _files(reader: CheckpointReader, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    for name in reader.names:
        tensor = reader.read(name)
        tensors[name] = tensor if _is_of(tensor, dtype) else tensor.to(dtype)
        if sum(one.nbytes for one in tensors.values()) >= FILE_BYTES:
            yield tensors
            tensors = {}
    if tensors:
        yield tensors


def _is_of(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype or not tensor.is_floating_point()
