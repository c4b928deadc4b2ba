"""What `trainer convert` does with which source: picks the conversion, owns the output directory."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer

from polyhead_core.backbone import resolve_source
from polyhead_core.backbone.checkpoint import fingerprint, record_conversion
from polyhead_core.backbone.convert import int8_directory
from polyhead_core.backbone.load import is_int8_checkpoint
from polyhead_trainer.convert.from_meta import is_meta_directory, meta_to_hugging_face
from polyhead_trainer.convert.to_meta import hugging_face_to_meta
from polyhead_trainer.errors import ConversionError
from polyhead_trainer.staging import new_directory

Target = Literal["huggingface", "meta", "int8"]
NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "original", "*.pth")
"""What of a float directory has no place in its int8 version; the rest is the tokenizer's."""


def convert(
    source: str,
    output: Path,
    target: Target,
    *,
    num_shards: int = 1,
    calibrate: bool = True,
    max_positions: int | None = None,
    rope_factor: float | None = None,
) -> list[str]:
    """Makes the directory `output` and returns remarks. Raises ConversionError, BackboneError, OutputExists."""
    directory = Path(source).expanduser()
    from_meta = is_meta_directory(directory)
    with (
        new_directory(output) as staging,
        tempfile.TemporaryDirectory(prefix=".float.", dir=output.parent) as folder,
    ):
        scratch = Path(folder)
        if target == "meta":
            if from_meta:
                raise ConversionError(f"{source} is in Meta's layout already; to change its shards, go by huggingface")
            return hugging_face_to_meta(_float_directory(source, scratch), staging, num_shards=num_shards)
        if target == "huggingface":
            if from_meta:
                return meta_to_hugging_face(directory, staging, max_positions=max_positions, rope_factor=rope_factor)
            return _gguf_to_hugging_face(directory, scratch, staging)
        remarks: list[str] = []
        if from_meta:
            floats = scratch / "model"
            floats.mkdir()
            remarks = meta_to_hugging_face(directory, floats, max_positions=max_positions, rope_factor=rope_factor)
        else:
            floats = _float_directory(source, scratch)
        if calibrate:
            _check_tokenizer(source, floats)
        return remarks + _to_int8(floats, staging, scratch, calibrate)


def _float_directory(source: str, scratch: Path) -> Path:
    """A .gguf file is converted into `scratch`; all else is where it is, or in the cache of the default backbone."""
    directory = resolve_source(source, scratch if source.endswith(".gguf") else None)
    if is_int8_checkpoint(directory):
        raise ConversionError(f"{source} is in int8 already: expected float weights, which int8 cannot give back")
    return directory


def _gguf_to_hugging_face(file: Path, scratch: Path, output: Path) -> list[str]:
    if file.suffix != ".gguf":
        raise ConversionError(
            f"{file} is neither Meta's layout (consolidated.*.pth with params.json) nor a .gguf: nothing to convert"
        )
    for part in resolve_source(str(file), scratch).iterdir():
        part.rename(output / part.name)
    return ["the weights are those that the GGUF file's quantisation left, in float32"]


def _check_tokenizer(source: str, floats: Path) -> None:
    try:
        AutoTokenizer.from_pretrained(floats)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConversionError(
            f"{source} has no tokenizer, by which the calibration reads its text: put its files (tokenizer.json, or "
            "Meta's tokenizer.model) there, or give --no-calibrate"
        ) from error


def _to_int8(floats: Path, output: Path, scratch: Path, calibrate: bool) -> list[str]:
    identity = fingerprint(floats, scratch)
    made = int8_directory(floats, identity, scratch, calibrate=calibrate)
    shutil.copytree(floats, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NOT_COPIED, ".*"))
    for part in made.iterdir():
        part.rename(output / part.name)
    record_conversion(output, identity)
    remarks = ["adapters trained on this directory fit its source, and the other way round"]
    if calibrate:
        remarks.append("calibrated for Polyhead; for bitsandbytes, which ignores the calibration, use --no-calibrate")
    return remarks
