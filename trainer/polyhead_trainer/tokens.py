"""Small facts about tokenizers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills batches up; the end token where there is no padding token. It is masked by position, never by id."""
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(pad_id, int)
    return pad_id
