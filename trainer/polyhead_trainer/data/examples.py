"""One example of a task, as text and as tokens.

What is learned is marked by position, never by token id: with many tokenizers the padding token is the end token, and
a mask by id would keep the model from ever learning to stop.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

Form = Literal["completion", "messages", "classification", "preference"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record of a file, in one of four forms: prompt and completion, a conversation that ends with the assistant's
    answer, a text (`prompt`) with its label (`completion`), or a prompt with a better and a worse completion."""

    origin: str
    """`file:line`, for messages."""
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, str], ...] = ()
    rejected: str = ""
    """The worse completion; `completion` is the better one."""
    form: Form = "completion"

    @property
    def reference(self) -> str:
        return self.messages[-1]["content"] if self.messages else self.completion

    @property
    def question(self) -> str:
        return self.messages[-2]["content"] if len(self.messages) > 1 else self.prompt

    @property
    def identity(self) -> str:
        return json.dumps([self.prompt, self.completion, self.messages])


@dataclass(frozen=True, kw_only=True)
class EncodedExample:
    example: Example
    token_ids: list[int]
    is_label: list[bool]
    """Which of `token_ids` are learned: completions and the end tokens after them."""
    prompt_length: int
    """Number of tokens before the last completion: what a generation starts from."""

    @property
    def num_labels(self) -> int:
        return sum(self.is_label)

    @property
    def width(self) -> int:
        """Tokens of its longest sequence: what `data.max_length` limits."""
        return len(self.token_ids)

    def __len__(self) -> int:
        """Tokens that a forward pass over it reads."""
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class EncodedData:
    examples: list[EncodedExample]
    num_too_long: int
    """Examples left out because of their length."""

    @property
    def num_tokens(self) -> int:
        return sum(len(example) for example in self.examples)
