"""Which tokens of a tokenizer are control tokens, and texts in which what only looks like one stays text.

Control tokens are the tokenizer's special tokens and the added tokens that its chat template spells out (the rule of
transformers' `sanitize_control_tokens`, which older versions lack). In a chat only the template's own count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

# Unicode noncharacters: no text may hold them, so they can mark what came from outside while a template runs.
_MARK_START, _MARK_END = "\ufdd0", "\ufdd1"


class ControlTokens:
    """Of one fast tokenizer of transformers. Thread-safe: its tokenizers are its own and are never reconfigured."""

    def __init__(self, tokenizer: Any) -> None:
        definition = tokenizer.backend_tokenizer.to_str()
        tokens = _control_tokens(json.loads(definition)["added_tokens"], tokenizer.chat_template)
        self.parsing = Tokenizer.from_str(definition)
        """Takes what looks like a control token for one."""
        self.plain = Tokenizer.from_str(_with_special(definition, tokens))
        """Takes it for text."""
        self.plain.encode_special_tokens = True
        for backend in (self.parsing, self.plain):
            backend.no_padding()
            backend.no_truncation()
        self._pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")

    def mark(self, content: str) -> str:
        """A message's content, for a chat template: what looks like a control token is marked as text."""
        unmarked = content.replace(_MARK_START, "").replace(_MARK_END, "")
        return self._pattern.sub(f"{_MARK_START}\\g<0>{_MARK_END}", unmarked)

    def encode_marked(self, rendered: str) -> list[int]:
        """Token ids of what a template made of marked contents, or of a part of it; nothing is added to them."""
        # Splitting gives template and ordinary content at even places and marked control tokens at odd ones. A mark
        # that a template cut off from its partner still parts the text, so that its two sides cannot join.
        ids: list[int] = []
        for place, piece in enumerate(re.split(f"{_MARK_START}([^{_MARK_START}{_MARK_END}]*){_MARK_END}", rendered)):
            backend = self.plain if place % 2 else self.parsing
            for part in re.split(f"[{_MARK_START}{_MARK_END}]", piece):
                ids += backend.encode(part, add_special_tokens=False).ids
        return ids


def _control_tokens(added_tokens: Sequence[Mapping[str, Any]], chat_template: object) -> set[str]:
    template = str(chat_template or "")
    return {
        token["content"]
        for token in added_tokens
        if token["special"] or (token["content"] in template and not token["content"].isspace())
    }


def _with_special(definition: str, control_tokens: set[str]) -> str:
    """The tokenizer's `definition` with all `control_tokens` flagged special, as `encode_special_tokens` wants them."""
    parsed = json.loads(definition)
    for token in parsed["added_tokens"]:
        token["special"] = token["content"] in control_tokens
    return json.dumps(parsed)
