"""Meta's consolidated.*.pth into a Hugging Face directory, tensor by tensor: nothing is unpickled but tensors."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from polyhead_core.backbone.checkpoint import INDEX_FILE
from polyhead_trainer.convert.llama_layout import COMPUTED, EmbeddingSplit, LlamaTensor, llama_tensors, rotary_halves
from polyhead_trainer.convert.llama_tokenizer import TOKENIZER_FILE, save_tokenizer
from polyhead_trainer.convert.meta_params import PARAMS_FILE, LlamaParams, config_of, read_params, rope_factor_of
from polyhead_trainer.errors import ConversionError

SHARDS = "consolidated*.pth"
ORIGINAL = "original"
"""Sub-folder that keeps Meta's params.json, as Meta's own repositories have it: the way back then restores it."""
MAX_FILE_BYTES = 1 << 30
"""Of one safetensors file: what is held in memory at once, or the largest tensor where that is larger."""


def is_meta_directory(directory: Path) -> bool:
    return directory.is_dir() and any(directory.glob(SHARDS))


def meta_to_hugging_face(
    source: Path,
    output: Path,
    *,
    max_positions: int | None = None,
    rope_factor: float | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[str]:
    """Fills the folder `output`; returns remarks for the user. Raises ConversionError.

    `max_positions` and `rope_factor` are what params.json does not say; unset, those of the published models.
    """
    params = read_params(source / PARAMS_FILE)
    checkpoint = MetaCheckpoint(source, params)
    tied = checkpoint.is_tied()
    tensors = [tensor for tensor in checkpoint.tensors if not (tied and tensor.meta == "output.weight")]
    _write_safetensors(output, tensors, checkpoint.read, checkpoint.itemsize, max_file_bytes)
    config = config_of(params, checkpoint.vocabulary, tied=tied, max_positions=max_positions, rope_factor=rope_factor)
    config.dtype = checkpoint.dtype
    config.save_pretrained(output)
    GenerationConfig.from_model_config(config).save_pretrained(output)
    (output / ORIGINAL).mkdir()
    shutil.copyfile(source / PARAMS_FILE, output / ORIGINAL / PARAMS_FILE)
    remarks = [f"max_position_embeddings = {config.max_position_embeddings} (params.json does not say it)"]
    if params.use_scaled_rope:
        remarks.append(f"rope factor = {rope_factor_of(config)} (params.json does not say it)")
    if not (source / TOKENIZER_FILE).is_file():
        return [*remarks, f"{source} has no {TOKENIZER_FILE}: the output has no tokenizer"]
    return remarks + save_tokenizer(source / TOKENIZER_FILE, output, checkpoint.vocabulary)


class MetaCheckpoint:
    """The joined tensors of all model-parallel shards. The files are mapped, and read where a tensor is asked for."""

    def __init__(self, directory: Path, params: LlamaParams) -> None:
        self.directory = directory
        self._shards = [_open_shard(file) for file in _shard_files(directory)]
        names = set(self._shards[0])
        for number, shard in enumerate(self._shards):
            if set(shard) != names:
                odd = sorted(set(shard) ^ names)
                raise ConversionError(f"{directory}: shards 0 and {number} differ in {', '.join(odd[:5])}")
        for needed in ("output.weight", "tok_embeddings.weight", "norm.weight"):
            if needed not in names:
                raise ConversionError(f"{directory} lacks {needed}: not Meta's Llama layout, or not all of it")
        self.vocabulary = sum(shard["output.weight"].shape[0] for shard in self._shards)
        if params.vocab_size not in (-1, self.vocabulary):
            raise ConversionError(
                f"{directory}: params.json says vocab_size = {params.vocab_size}, output.weight has "
                f"{self.vocabulary} rows in {len(self._shards)} shards; is a shard missing?"
            )
        self.tensors = list(llama_tensors(params.shape(self.vocabulary), self._embedding_split(params)))
        self._check(names)

    def _embedding_split(self, params: LlamaParams) -> EmbeddingSplit:
        """By what the shards hold: Meta changed it from Llama 2 to 3."""
        columns = self._shards[0]["tok_embeddings.weight"].shape[-1]
        return "width" if columns * len(self._shards) == params.dim else "vocabulary"

    def _check(self, names: set[str]) -> None:
        expected = {tensor.meta for tensor in self.tensors}
        missing, superfluous = sorted(expected - names), sorted(names - expected - set(COMPUTED))
        if missing or superfluous:
            raise ConversionError(
                f"{self.directory}: params.json and weights do not belong together: {len(missing)} tensors missing "
                f"({', '.join(missing[:3])}), {len(superfluous)} unknown ({', '.join(superfluous[:3])})"
            )
        for tensor in self.tensors:
            wanted = tensor.shard_shape(len(self._shards))
            for number, shard in enumerate(self._shards):
                found = shard[tensor.meta]
                if tuple(found.shape) != wanted or found.dtype != self.dtype:
                    raise ConversionError(
                        f"{self.directory}: shard {number}: {tensor.meta} is {found.dtype} {tuple(found.shape)}, "
                        f"expected {self.dtype} {wanted} by params.json and {len(self._shards)} shards"
                    )

    @property
    def dtype(self) -> torch.dtype:
        return self._shards[0]["norm.weight"].dtype

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def is_tied(self) -> bool:
        """Whether head and embedding are equal bit for bit: stored once in the Hugging Face directory."""
        by_meta = {tensor.meta: tensor for tensor in self.tensors}
        embedding, output = (self.read(by_meta[name]) for name in ("tok_embeddings.weight", "output.weight"))
        return torch.equal(embedding, output)

    def read(self, tensor: LlamaTensor) -> Tensor:
        """The whole tensor in transformers' order of rows."""
        parts = [shard[tensor.meta] for shard in self._shards]
        if tensor.split is None:
            return self._replicated(tensor, parts)
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=tensor.split)
        return rotary_halves(whole, tensor.rotary_heads) if tensor.rotary_heads else whole

    def _replicated(self, tensor: LlamaTensor, parts: list[Tensor]) -> Tensor:
        for number, part in enumerate(parts):
            if not torch.equal(part, parts[0]):
                raise ConversionError(
                    f"{self.directory}: {tensor.meta} differs between shards 0 and {number}, where every shard "
                    "should hold the same: the shards are not of one model"
                )
        return parts[0]


def _shard_files(directory: Path) -> list[Path]:
    files = sorted(directory.glob(SHARDS))
    if not files:
        raise ConversionError(f"{directory} has no consolidated.*.pth: expected Meta's Llama layout")
    numbers = [file.name.removeprefix("consolidated").removesuffix(".pth").strip(".") for file in files]
    if len(files) > 1 and numbers != [f"{number:02}" for number in range(len(files))]:
        raise ConversionError(
            f"{directory} has the shards {', '.join(numbers)}: expected 00 to {len(files) - 1:02} without a gap"
        )
    return files


def _open_shard(file: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConversionError(
            f"cannot read {file} as tensors: {reason}; expected a file that torch.save wrote (version 1.6 or newer) "
            "with nothing but tensors in it: anything else in it could run code and is never opened"
        ) from error
    if not isinstance(loaded, dict):
        raise ConversionError(f"{file} holds a {type(loaded).__name__}: expected tensors by their names")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ConversionError(f"{file}: {name!r} is a {type(tensor).__name__}: expected a tensor with a name")
        if not tensor.is_floating_point() or not tensor.is_contiguous():
            raise ConversionError(f"{file}: {name} is {tensor.dtype}, strides {tensor.stride()}: expected plain floats")
    return loaded


def _write_safetensors(
    output: Path,
    tensors: list[LlamaTensor],
    read: Callable[[LlamaTensor], Tensor],
    itemsize: int,
    max_file_bytes: int,
) -> None:
    files = _group(tensors, itemsize, max_file_bytes)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        content = {tensor.hugging_face: read(tensor).contiguous() for tensor in group}
        save_file(content, output / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(content, name))
    if len(files) > 1:
        total = sum(_num_elements(tensor) for tensor in tensors) * itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (output / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _group(tensors: list[LlamaTensor], itemsize: int, max_file_bytes: int) -> list[list[LlamaTensor]]:
    groups: list[list[LlamaTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        num_bytes = _num_elements(tensor) * itemsize
        if groups[-1] and filled + num_bytes > max_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += num_bytes
    return groups


def _num_elements(tensor: LlamaTensor) -> int:
    return int(torch.Size(tensor.shape).numel())
