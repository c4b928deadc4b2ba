"""A Hugging Face directory of a Llama model into Meta's layout, in as many model-parallel shards as asked for."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig

from polyhead_core.backbone.checkpoint import CheckpointReader
from polyhead_core.errors import BackboneError
from polyhead_trainer.convert.from_meta import ORIGINAL
from polyhead_trainer.convert.llama_layout import LlamaShape, LlamaTensor, llama_tensors, rotary_pairs
from polyhead_trainer.convert.llama_tokenizer import TOKENIZER_FILE
from polyhead_trainer.convert.meta_params import (
    PARAMS_FILE,
    LlamaParams,
    lost_token_ids,
    needed_options,
    params_of,
    read_params,
)
from polyhead_trainer.errors import ConversionError


def hugging_face_to_meta(source: Path, output: Path, *, num_shards: int = 1) -> list[str]:
    """Fills the folder `output`; returns remarks for the user. Raises ConversionError.

    The shards' tensors are filled through mapped files beside `output`, so that the disk and not the memory holds them.
    """
    config = _read_config(source)
    params = params_of(config)
    shape = params.shape(config.vocab_size)
    _check_divisible(shape, num_shards)
    reader = CheckpointReader(source)
    tensors = list(llama_tensors(shape, shape.embedding_split))
    _check_names(reader, tensors, tied=bool(config.tie_word_embeddings))
    with tempfile.TemporaryDirectory(prefix=".tensors.", dir=output) as scratch:
        shards: list[dict[str, Tensor]] = [{} for _ in range(num_shards)]
        for tensor in tensors:
            for number, part in enumerate(_parts(reader, tensor, num_shards)):
                shards[number][tensor.meta] = _on_disk(part, Path(scratch) / f"{number}.{tensor.meta}")
        for number, shard in enumerate(shards):
            torch.save(shard, output / f"consolidated.{number:02}.pth")
            shard.clear()
    text, remarks = _params_text(source, params)
    if options := needed_options(config, params, tied=_is_tied(reader)):
        remarks.append(
            f"params.json does not say all of config.json: for the way back, give `--to huggingface {options}`"
        )
    if lost := lost_token_ids(config, params):
        remarks.append(
            f"params.json has no place for token ids: {lost} are not kept; after the way back, set them in config.json "
            "and generation_config.json"
        )
    (output / PARAMS_FILE).write_text(text, encoding="utf-8")
    if (source / TOKENIZER_FILE).is_file():
        shutil.copyfile(source / TOKENIZER_FILE, output / TOKENIZER_FILE)
    else:
        remarks.append(f"{source} has no {TOKENIZER_FILE}: the output has none")
    return remarks


def _read_config(source: Path) -> LlamaConfig:
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ConversionError(f"cannot read {source / 'config.json'}: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConversionError(f"{source} is quantised: Meta's layout holds float weights; give the float directory")
    if not isinstance(config, LlamaConfig):
        raise ConversionError(f"{source} holds a {config.model_type!r} model: Meta's layout is for Llama models")
    return config


def _check_divisible(shape: LlamaShape, num_shards: int) -> None:
    sizes = {
        "attention heads": shape.num_heads,
        "key/value heads": shape.num_kv_heads,
        "feed-forward width": shape.feed_forward,
        "vocabulary": shape.vocabulary,
        "hidden width": shape.hidden,
    }
    odd = [f"{name} ({size})" for name, size in sizes.items() if num_shards < 1 or size % num_shards]
    if odd:
        raise ConversionError(f"{num_shards} shards do not divide {', '.join(odd)}: choose another number of shards")


def _check_names(reader: CheckpointReader, tensors: list[LlamaTensor], *, tied: bool) -> None:
    expected = {tensor.hugging_face for tensor in tensors}
    found = {name for name in reader.names if not name.endswith(".rotary_emb.inv_freq")}
    missing, superfluous = sorted(expected - found - ({"lm_head.weight"} if tied else set())), sorted(found - expected)
    if missing or superfluous:
        raise ConversionError(
            f"{reader.directory}: {len(missing)} tensors missing ({', '.join(missing[:3])}), {len(superfluous)} "
            f"without a place in Meta's layout ({', '.join(superfluous[:3])})"
        )


def _is_tied(reader: CheckpointReader) -> bool:
    """As MetaCheckpoint.is_tied will find it, whatever config.json says."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    return head not in reader or torch.equal(reader.read(head), reader.read(embedding))


def _parts(reader: CheckpointReader, tensor: LlamaTensor, num_shards: int) -> list[Tensor]:
    tied_head = tensor.hugging_face not in reader
    try:
        whole = reader.read("model.embed_tokens.weight" if tied_head else tensor.hugging_face)
    except BackboneError as error:
        raise ConversionError(error.message) from error
    if tuple(whole.shape) != tensor.shape:
        raise ConversionError(
            f"{reader.directory}: {tensor.hugging_face} has shape {tuple(whole.shape)}, expected {tensor.shape} by "
            "config.json"
        )
    if tensor.rotary_heads:
        whole = rotary_pairs(whole, tensor.rotary_heads)
    return [whole] * num_shards if tensor.split is None else list(whole.chunk(num_shards, dim=tensor.split))


def _on_disk(tensor: Tensor, file: Path) -> Tensor:
    """A copy of the tensor that lives in `file`: its pages can leave the memory."""
    copy = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def _params_text(source: Path, made: LlamaParams) -> tuple[str, list[str]]:
    """Meta's own params.json where the directory kept it and it says the same, else one made from config.json."""
    kept = source / ORIGINAL / PARAMS_FILE
    if kept.is_file():
        if read_params(kept).architecture == made.architecture:
            return kept.read_text(encoding="utf-8"), []
        return made.model_dump_json(exclude_none=True), [f"{kept} does not describe this model: not used"]
    return made.model_dump_json(exclude_none=True), []
