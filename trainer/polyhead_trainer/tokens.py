"""Small facts about tokenizers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyhead_core.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What ends a completion. Raises BackboneError."""
    found = tokenizer.eos_token_id
    if not isinstance(found, int):
        raise BackboneError(
            "the backbone's tokenizer names no end token, and nothing could be learned to end: set eos_token in its "
            "tokenizer_config.json"
        )
    return found


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills batches up; the end token where there is no padding token. It is masked by position, never by id.

    Raises BackboneError where there is neither.
    """
    found = tokenizer.pad_token_id
    return found if isinstance(found, int) else end_id(tokenizer)
