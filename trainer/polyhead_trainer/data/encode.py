"""From examples to token ids with a label mask. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from polyhead_core.control_tokens import ControlTokens
from polyhead_trainer.data.examples import EncodedExample, Example, Form
from polyhead_trainer.errors import DataError
from polyhead_trainer.tokens import end_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> EncodedExample:
    """Raises DataError for a record of another form, or a conversation that the chat template does not lay out turn
    after turn; BackboneError for a tokenizer without an end token."""
    expect_form(example, "completion", "messages")
    end = end_id(tokenizer)
    pieces = _chat_pieces(example, tokenizer) if example.messages else _completion_pieces(example, tokenizer, end)
    token_ids = [token for ids, _ in pieces for token in ids]
    is_label = [label for ids, label in pieces for _ in ids]
    prompt_length = sum(len(ids) for ids, _ in pieces[:-1])
    return EncodedExample(example=example, token_ids=token_ids, is_label=is_label, prompt_length=prompt_length)


def expect_form(example: Example, *forms: Form) -> None:
    if example.form not in forms:
        raise DataError(
            f"{example.origin}: a record for {example.form}, where the task expects {' or '.join(forms)}: set `task`, "
            "or give other data"
        )


def _completion_pieces(example: Example, tokenizer: PreTrainedTokenizerBase, end: int) -> list[tuple[list[int], bool]]:
    # Apart, because the server sees the prompt alone; without control tokens, because it takes prompts as plain text.
    prompt = tokenizer(example.prompt, split_special_tokens=True)["input_ids"]
    completion = tokenizer(example.completion, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [(prompt, False), ([*completion, end], True)]


def _chat_pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], bool]]:
    """By turns what is given and what the assistant says, its end token included. What the assistant opens a
    conversation with is given: nothing was asked."""
    # As the server takes messages: what only looks like a control token is text.
    control = _control_of(tokenizer, tokenizer.chat_template)
    messages = [{**message, "content": control.mark(message["content"])} for message in example.messages]
    pieces: list[tuple[str, bool]] = []
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or turn == 0:
            continue
        where = f"{example.origin}: messages[{turn}]"
        given = _render(messages[:turn], tokenizer, where, answer_next=True)
        answered = _render(messages[: turn + 1], tokenizer, where, answer_next=False)
        end = answered.find(tokenizer.eos_token, len(given) + len(message["content"].strip()))
        if end < 0 or not (given.startswith(done) and answered.startswith(given)):
            raise DataError(
                f"{where}: the chat template does not lay this answer out as a continuation that ends in "
                f"{tokenizer.eos_token}; give such data as prompt and completion"
            )
        answer_end = end + len(tokenizer.eos_token)
        pieces += [(given[len(done) :], False), (answered[len(given) : answer_end], True)]
        done = answered[:answer_end]
    if not pieces:
        raise DataError(f"{example.origin}: messages: expected something that the assistant answers")
    return [(control.encode_marked(text), label) for text, label in pieces]


@lru_cache(maxsize=4)
def _control_of(tokenizer: PreTrainedTokenizerBase, chat_template: object) -> ControlTokens:
    return ControlTokens(tokenizer)


def _render(
    messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str, *, answer_next: bool
) -> str:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise DataError("the backbone's tokenizer has no chat template; give the data as prompt and completion")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_next)
    except TemplateError as error:  # templates refuse roles, and their order, of their own accord
        raise DataError(f"{where}: the backbone's chat template refuses this conversation: {error}") from error
    assert isinstance(text, str)
    return text
