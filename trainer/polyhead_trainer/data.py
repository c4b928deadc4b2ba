"""From JSONL files to token ids with a label mask. Owns the two forms of examples and their validation; knows no torch.

What is learned is marked by position, never by token id: with many tokenizers the padding token is the end token, and
a mask by id would keep the model from ever learning to stop.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyhead_trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One line of a file: a prompt with its completion, or a conversation that ends with the assistant's answer."""

    origin: str
    """`file:line`, for messages."""
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, str], ...] = ()

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

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class EncodedData:
    examples: list[EncodedExample]
    num_too_long: int
    """Examples left out because of their length."""

    @property
    def num_tokens(self) -> int:
        return sum(len(example) for example in self.examples)


def read_jsonl(file: Path) -> list[Example]:
    """Raises DataError naming file, line and field."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    examples = [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not examples:
        raise DataError(f"{file} holds no examples")
    return examples


def _parse(line: str, origin: str) -> Example:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{origin}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{origin}: expected an object, got {type(record).__name__}")
    if set(record) == {"messages"}:
        return Example(origin=origin, messages=_messages(record["messages"], origin))
    if set(record) != {"prompt", "completion"}:
        raise DataError(
            f'{origin}: expected the fields "prompt" and "completion", or "messages" alone; '
            f"got {', '.join(map(repr, record)) or 'none'}"
        )
    prompt, completion = (_text(record[name], f"{origin}: {name}") for name in ("prompt", "completion"))
    return Example(origin=origin, prompt=prompt, completion=completion)


def _messages(value: Any, origin: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{origin}: messages: expected a list of messages")
    for index, message in enumerate(value):
        where = f"{origin}: messages[{index}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise DataError(f'{where}: expected an object with "role" and "content"')
        if message["role"] not in ROLES:
            raise DataError(f"{where}.role = {message['role']!r}: expected one of {', '.join(ROLES)}")
        _text(message["content"], f"{where}.content")
    if value[-1]["role"] != "assistant":
        raise DataError(
            f"{origin}: messages[{len(value) - 1}].role = {value[-1]['role']!r}: the last must be assistant"
        )
    return tuple(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a text, got {type(value).__name__}")
    if not value:
        raise DataError(f"{where}: must not be empty")
    return value


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> EncodedExample:
    """Raises DataError for a conversation that the chat template does not lay out turn after turn."""
    pieces = _chat_pieces(example, tokenizer) if example.messages else _completion_pieces(example, tokenizer)
    token_ids = [token for ids, _ in pieces for token in ids]
    is_label = [label for ids, label in pieces for _ in ids]
    prompt_length = sum(len(ids) for ids, _ in pieces[:-1])
    return EncodedExample(example=example, token_ids=token_ids, is_label=is_label, prompt_length=prompt_length)


def _completion_pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], bool]]:
    # Apart, because the server sees the prompt alone; without control tokens, because it takes prompts as plain text.
    prompt = tokenizer(example.prompt, split_special_tokens=True)["input_ids"]
    completion = tokenizer(example.completion, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [(prompt, False), ([*completion, tokenizer.eos_token_id], True)]


def _chat_pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], bool]]:
    """By turns what is given and what the assistant says, its end token included."""
    messages = list(example.messages)
    pieces: list[tuple[str, bool]] = []
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        given = _render(messages[:turn], tokenizer, answer_next=True)
        answered = _render(messages[: turn + 1], tokenizer, answer_next=False)
        end = answered.find(tokenizer.eos_token, len(given) + len(message["content"].strip()))
        if end < 0 or not (given.startswith(done) and answered.startswith(given)):
            raise DataError(
                f"{example.origin}: messages[{turn}]: the chat template does not lay this answer out as a continuation "
                f"that ends in {tokenizer.eos_token}; give such data as prompt and completion"
            )
        answer_end = end + len(tokenizer.eos_token)
        pieces += [(given[len(done) :], False), (answered[len(given) : answer_end], True)]
        done = answered[:answer_end]
    return [(tokenizer(text, add_special_tokens=False)["input_ids"], label) for text, label in pieces]


def _render(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, answer_next: bool) -> str:
    if tokenizer.chat_template is None:
        raise DataError("the backbone's tokenizer has no chat template; give the data as prompt and completion")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_next)
    assert isinstance(text, str)
    return text


def load_examples(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedData:
    examples = [encode(example, tokenizer) for file in files for example in read_jsonl(file)]
    fitting = [example for example in examples if len(example) <= max_length]
    if not fitting:
        raise DataError(f"{', '.join(map(str, files))}: every example is longer than max_length = {max_length} tokens")
    return EncodedData(examples=fitting, num_too_long=len(examples) - len(fitting))


def check_disjoint(train: Iterable[EncodedExample], held_out: Iterable[EncodedExample]) -> None:
    """Raises DataError where a held-out example is learned as well: what is measured on it would be worth nothing."""
    learned = {item.example.identity: item.example.origin for item in train}
    for item in held_out:
        if item.example.identity in learned:
            raise DataError(
                f"{item.example.origin}: this held-out example is learned too: {learned[item.example.identity]}"
            )


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 over the files' contents in their order: the identity of the data, recorded with the adapter."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
