"""Reads a directory's safetensors one tensor at a time, so that loading never holds the whole checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from polyhead_core.errors import BackboneError

logger = logging.getLogger(__name__)

PLAIN_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CALIBRATED_FILE = "polyhead_int8.safetensors"
"""Of a directory that Polyhead calibrated; see convert.save_int8."""
CONVERSION_KEY = "polyhead_conversion"
"""In config.json of a directory that was converted to int8: which weights it was made from; see record_conversion."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


class CheckpointReader:
    """The tensors of a Hugging Face directory, sharded or not."""

    def __init__(self, directory: Path, model: PreTrainedModel | None = None) -> None:
        """With `model`, tensors go by the model's names where the checkpoint has older ones."""
        self.directory = directory
        self._stored_as: dict[str, str] = {}
        self._files = _tensor_files(directory)
        if model is not None:
            self._rename(model)

    def _rename(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        expected = model.state_dict()
        renamed: dict[str, Path] = {}
        for stored, file in self._files.items():
            name = stored
            if stored not in expected:
                name, converter = rename_source_key(stored, renamings, converters, model.base_model_prefix, expected)
                if converter is not None:
                    raise BackboneError(
                        f"{self.directory}: {stored} is laid out differently in {type(model).__name__}; checkpoints "
                        "that need tensors to be joined or split are not read yet"
                    )
            renamed[name] = file
            self._stored_as[name] = stored
        self._files = renamed

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    def read(self, name: str) -> torch.Tensor:
        """A tensor backed by its file's pages.

        The mapping goes when the tensor goes, which is why each read opens anew: one mapping for all reads would count
        every page ever touched as memory of this process.
        """
        try:
            with safe_open(self._files[name], framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(self._stored_as.get(name, name))
                return tensor
        except (OSError, SafetensorError) as error:
            raise BackboneError(f"cannot read {name} from {self._files[name]}: {error}") from error


def _tensor_files(directory: Path) -> dict[str, Path]:
    index = directory / INDEX_FILE
    single = next((file for name in (CALIBRATED_FILE, PLAIN_FILE) if (file := directory / name).is_file()), None)
    try:
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise BackboneError(f"{index} has no weight_map of tensors and files: save or copy it again")
            missing = sorted({file for file in weight_map.values() if not (directory / file).is_file()})
            if missing:
                raise BackboneError(f"{directory} lacks the shards {', '.join(missing)} that its index names")
            return {name: directory / file for name, file in weight_map.items()}
        if single is not None:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
    except (OSError, ValueError, SafetensorError) as error:
        raise BackboneError(f"cannot read the checkpoint in {directory}: {error}") from error
    raise BackboneError(f"{directory} has no {PLAIN_FILE} and no {INDEX_FILE}; pickles are not read")


def read_json(file: Path) -> dict[str, Any]:
    """The object that a file of settings holds. Raises BackboneError."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"cannot read {file}: {error}") from error
    if not isinstance(values, dict):
        raise BackboneError(f"{file} holds a JSON {type(values).__name__}: expected an object")
    return values


def fingerprint(directory: Path, cache_dir: Path) -> str:
    """The identity of a directory's unquantised weights.

    `compute_fingerprint`, or of a directory that was converted to int8 and not changed since that of its source.
    """
    own = _own_fingerprint(directory, cache_dir)
    conversion = read_json(directory / "config.json").get(CONVERSION_KEY)
    if isinstance(conversion, dict) and conversion.get("tensors") == own:
        source = conversion.get("source")
        if isinstance(source, str) and _SHA256.fullmatch(source):
            return source
    return own


def record_conversion(directory: Path, source_fingerprint: str) -> None:
    """Says in its config.json that an int8 directory, as it is now, was made from weights of this fingerprint."""
    file = directory / "config.json"
    conversion = {"source": source_fingerprint, "tensors": compute_fingerprint(directory)}
    file.write_text(json.dumps(read_json(file) | {CONVERSION_KEY: conversion}, indent=2) + "\n", encoding="utf-8")


def _own_fingerprint(directory: Path, cache_dir: Path) -> str:
    """Kept in the cache by the files' stats where the cache can be read and written."""
    reader = CheckpointReader(directory)
    stats = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in set(reader._files.values()))
    key = hashlib.sha256(json.dumps([str(directory.resolve()), stats]).encode()).hexdigest()
    remembered = cache_dir / "fingerprints" / key
    with contextlib.suppress(OSError):
        known = remembered.read_text(encoding="ascii", errors="replace")
        if _SHA256.fullmatch(known):
            return known
    computed = compute_fingerprint(directory)
    try:
        _replace(remembered, computed)
    except OSError as error:
        logger.warning("cannot keep the fingerprint of %s, which is computed at each start: %s", directory, error)
    return computed


def _replace(file: Path, text: str) -> None:
    """Writes the file as a whole or not at all, whoever reads or writes it meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, staging = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with open(handle, "w", encoding="ascii") as opened:
            opened.write(text)
        os.chmod(staging, 0o644)
        os.replace(staging, file)
    except OSError:
        Path(staging).unlink(missing_ok=True)
        raise


def compute_fingerprint(directory: Path) -> str:
    """SHA-256 over the architecture's name and every tensor's name, type, shape and bytes.

    Independent of sharding, of later quantisation and of library versions.
    """
    reader = CheckpointReader(directory)
    config = read_json(directory / "config.json")
    digest = hashlib.sha256(str(config.get("model_type")).encode())
    for name in reader.names:
        tensor = reader.read(name).contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
