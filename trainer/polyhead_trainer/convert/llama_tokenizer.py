"""Meta's tokenizer.model (sentencepiece: Llama 1 and 2) as a tokenizer.json. The file is parsed, never executed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_base import generate_merges

from polyhead_trainer.errors import ConversionError

TOKENIZER_FILE = "tokenizer.model"
_CONTROL = 3  # the sentencepiece type of tokens that no text can spell


def save_tokenizer(file: Path, output: Path, vocabulary: int) -> list[str]:
    """Writes the tokenizer, and a copy of `file` for the way back; returns remarks. Raises ConversionError."""
    shutil.copyfile(file, output / TOKENIZER_FILE)
    if _is_tiktoken(file):
        # Llama 3's control tokens are named in Meta's code and not in the file: they cannot be taken from it.
        return [f"{file} is in tiktoken's form (Llama 3) and only copied: add the tokenizer.json of that model"]
    model = _parse(file)
    pieces = {piece.piece: number for number, piece in enumerate(model.pieces)}
    if len(pieces) > vocabulary:
        raise ConversionError(f"{file} has {len(pieces)} tokens, the model only {vocabulary}: not of one model")
    spec = model.trainer_spec
    unknown, begin, end = (model.pieces[number].piece for number in (spec.unk_id, spec.bos_id, spec.eos_id))
    control = [piece.piece for piece in model.pieces if piece.type == _CONTROL]
    scores = {piece.piece: piece.score for piece in model.pieces}
    tokenizer = LlamaTokenizer(
        vocab=pieces,
        merges=generate_merges(pieces, scores),
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        add_bos_token=True,
        additional_special_tokens=[token for token in control if token not in (begin, end)],
    )
    tokenizer.save_pretrained(output)
    return []


def _is_tiktoken(file: Path) -> bool:
    """Lines of base64 and a rank; sentencepiece's files are binary from the first byte on."""
    with file.open("rb") as opened:
        first = opened.readline(200).split()
    return len(first) == 2 and first[1].isdigit()


def _parse(file: Path) -> Any:
    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's DecodeError, whose package the trainer does not import
        raise ConversionError(f"{file} is no sentencepiece model: {error}; copy it again") from error
    spec = model.trainer_spec
    if any(not 0 <= number < len(model.pieces) for number in (spec.unk_id, spec.bos_id, spec.eos_id)):
        raise ConversionError(f"{file} names no unknown, begin and end token among its {len(model.pieces)}")
    return model
