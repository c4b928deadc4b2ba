"""Turns a GGUF file into a Hugging Face directory of float32 weights, tensor by tensor.

transformers reads GGUF as a whole; its own tables for names and layouts are used here for one tensor at a time, so that
the memory needed is that of one shard and of the widest tensor.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from polyhead_core.backbone.checkpoint import INDEX_FILE
from polyhead_core.backbone.gguf_rope import ROPE_FREQS, take_rope_scaling
from polyhead_core.errors import BackboneError

_SHARD_BYTES = 128 << 20
_COMPUTED = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?")
"""Tensors that older files hold of what the configuration says: not converted."""


def gguf_to_directory(gguf: Path, directory: Path) -> None:
    """Writes config, tokenizer and sharded weights into an empty `directory`.

    Raises BackboneError, also for what the file holds and the directory would not: tensors, and scalings of positions.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        reader = GGUFReader(str(gguf))
        take_rope_scaling(reader, config, gguf)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        missing = set(model.state_dict()) - _write_shards(_tensors(gguf, reader, model), directory)
    except (OSError, ValueError, KeyError, IndexError, struct.error, NotImplementedError) as error:
        raise BackboneError(f"cannot read {gguf} as GGUF: {error}") from error
    tied = {f"{path}.weight" for path, module in model.named_modules() if module is model.get_output_embeddings()}
    if missing - (tied if config.tie_word_embeddings else set()):
        raise BackboneError(f"{gguf} lacks {len(missing)} tensors, {', '.join(sorted(missing)[:5])} among them")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _tensors(gguf: Path, reader: GGUFReader, model: Any) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, float32 tensor) of every tensor in the file; BackboneError for what the model lacks."""
    from transformers import modeling_gguf_pytorch_utils

    tables: Any = modeling_gguf_pytorch_utils
    architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    parameters = tables.load_gguf_checkpoint(str(gguf), return_tensors=False)
    joined: dict[str, Tensor] = {}  # what some architectures put together from several of the file's tensors
    parameters["tensors"] = joined
    processor = tables.TENSOR_PROCESSORS.get(architecture, tables.TensorProcessor)(config=parameters["config"])
    names = tables.get_gguf_hf_weights_map(model, processor)
    superfluous: list[str] = []
    for stored in reader.tensors:
        if stored.name == ROPE_FREQS or _COMPUTED.fullmatch(stored.name):
            continue
        found = processor.process(
            weights=dequantize(stored.data, stored.tensor_type),
            name=stored.name,
            tensor_key_mapping=names,
            parsed_parameters=parameters,
        )
        if found.name in names:
            values = found.weights if found.weights.flags.writeable else found.weights.copy()
            yield names[found.name], torch.from_numpy(values).float().contiguous()
        elif found.name is not None:  # None: the processor has put it into `joined`
            superfluous.append(stored.name)
    if superfluous:
        raise BackboneError(
            f"{gguf} holds {len(superfluous)} tensors that {type(model).__name__} does not have, "
            f"{', '.join(superfluous[:5])} among them: give the model's Hugging Face directory instead"
        )
    yield from joined.items()


def _write_shards(tensors: Iterator[tuple[str, Tensor]], directory: Path) -> set[str]:
    """Writes safetensors of about _SHARD_BYTES and their index; returns the names written."""
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total_bytes = 0

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(one.nbytes for one in shard.values()) + tensor.nbytes > _SHARD_BYTES:
            flush()
        shard[name] = tensor
        total_bytes += tensor.nbytes
    if shard:
        flush()
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return set(weight_map)
