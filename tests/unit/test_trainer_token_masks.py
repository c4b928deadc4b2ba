"""Which tokens are learned: against character spans of the whole text, and by what a model does after training."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from polyhead_core.backbone import Backbone, load_backbone
from polyhead_trainer import methods
from polyhead_trainer.config import FullSettings, TrainingSection
from polyhead_trainer.data import EncodedExample, Example, encode
from polyhead_trainer.errors import DataError
from polyhead_trainer.loop import StepReport, TrainingLoop
from polyhead_trainer.objectives import CompletionObjective
from polyhead_trainer.packing import prepare_packing
from polyhead_trainer.tokens import padding_id
from tiny import save_backbone

Message = dict[str, str]


def says(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple({"role": role, "content": content} for role, content in turns)


CONVERSATIONS = [
    says(("user", "What is 2 + 2?"), ("assistant", "4")),
    says(("system", "Be brief."), ("user", "Name a city."), ("assistant", "Oslo, in Norway."), ("user", "And another?"))
    + says(("assistant", "Rome"), ("user", "Which of them is farther north, assistant?"), ("assistant", "Oslo")),
    says(("user", "Count."), ("assistant", "One."), ("assistant", "Two."), ("user", "On!"), ("assistant", "Three. ü")),
    says(("assistant", "How can I help?"), ("user", "Not at all."), ("assistant", "Goodbye.")),
]
ANSWER = r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)"
TEXTS = [("Capital of France:", " Paris"), ("a:", " b"), ("Repeat: user\n", "user\nassistant\n" * 5)]


@pytest.fixture(scope="module")
def real(default_directory: Path) -> PreTrainedTokenizerBase:
    """The default backbone's: its padding token is its end token."""
    made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(default_directory)
    assert made.pad_token_id == made.eos_token_id
    return made


def learned_by_characters(text: str, pattern: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """The slow obvious way: all of the text's tokens, learned where they lie in a group of `pattern`."""
    spans = [match.span(1) for match in re.finditer(pattern, text, re.DOTALL)]
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [any(start <= a and b <= end for start, end in spans) for a, b in whole["offset_mapping"]]
    return whole["input_ids"], inside


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_what_the_assistant_says_is_learned_with_its_end_and_nothing_else(
    real: PreTrainedTokenizerBase, messages: tuple[Message, ...]
) -> None:
    item = encode(Example(origin="x", messages=messages, form="messages"), real)
    text = real.apply_chat_template(list(messages), tokenize=False)
    assert isinstance(text, str)
    # What opens a conversation is no answer (this template puts a system message before it).
    spoken = (
        ANSWER if messages[0]["role"] != "assistant" else f"(?<!SmolLM, trained by Hugging Face<.im_end.>\n){ANSWER}"
    )
    ids, learned = learned_by_characters(text, spoken, real)
    # Behind the last end the template puts a line break, which nobody needs.
    assert item.token_ids == ids[: len(item)]
    assert item.is_label == learned[: len(item)]
    assert not any(learned[len(item) :])
    ends = [label for token, label in zip(item.token_ids, item.is_label, strict=True) if token == real.eos_token_id]
    assert sum(ends) == sum(message["role"] == "assistant" for message in messages[1:]) < len(ends)


@pytest.mark.parametrize(("prompt", "completion"), TEXTS)
def test_of_a_prompt_nothing_is_learned(real: PreTrainedTokenizerBase, prompt: str, completion: str) -> None:
    item = encode(Example(origin="x", prompt=prompt, completion=completion), real)
    text = prompt + completion + str(real.eos_token)
    ids, learned = learned_by_characters(text, f"^{re.escape(prompt)}(.*)$", real)
    assert (item.token_ids, item.is_label) == (ids, learned)
    assert (item.token_ids[-1], item.is_label[-1]) == (real.eos_token_id, True)


def test_conversations_that_cannot_be_laid_out_are_named(real: PreTrainedTokenizerBase) -> None:
    alone = Example(origin="d.jsonl:3", messages=says(("assistant", "Hello")), form="messages")
    with pytest.raises(DataError, match=r"d\.jsonl:3: messages: expected something that the assistant answers"):
        encode(alone, real)
    strict = copy.deepcopy(real)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    twice = Example(origin="d.jsonl:4", messages=CONVERSATIONS[0], form="messages")
    with pytest.raises(DataError, match=r"d\.jsonl:4: messages\[1\]: .* refuses this conversation: roles must alt"):
        encode(twice, strict)


@dataclass
class Silent:
    def after_step(self, loop: TrainingLoop, report: StepReport) -> None:
        """Nothing."""


@pytest.fixture
def pad_is_end(tmp_path: Path) -> Backbone:
    backbone = load_backbone(str(save_backbone("llama", tmp_path / "llama")), quantization="none")
    backbone.tokenizer.pad_token = backbone.tokenizer.eos_token
    assert padding_id(backbone.tokenizer) == backbone.tokenizer.eos_token_id
    return backbone


def encoded(backbone: Backbone) -> list[EncodedExample]:
    """Of many lengths, so that most rows of a batch are padded with end tokens."""
    texts = [encode(Example(origin="x", prompt=one, completion=two), backbone.tokenizer) for one, two in TEXTS]
    chats = [Example(origin="x", messages=messages, form="messages") for messages in CONVERSATIONS]
    return texts + [encode(example, backbone.tokenizer) for example in chats]


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_of_the_learned_tokens_alone(pad_is_end: Backbone, packing: bool) -> None:
    model, examples, total = pad_is_end.model.eval(), encoded(pad_is_end), 0.0
    with torch.no_grad():
        for item in examples:
            all_losses = F.cross_entropy(
                model(torch.tensor([item.token_ids])).logits[0, :-1], torch.tensor(item.token_ids[1:]), reduction="none"
            )
            total += all_losses[torch.tensor(item.is_label[1:])].sum().item()
        if packing:
            prepare_packing(model, examples, padding_id(pad_is_end.tokenizer))
        objective = CompletionObjective(padding_id(pad_is_end.tokenizer), packing=packing)
        found = objective.loss_sum(model, examples, torch.device("cpu")).item()
    assert found == pytest.approx(total, rel=1e-5)


def test_a_model_learns_to_stop_though_padding_is_the_end_token(pad_is_end: Backbone) -> None:
    """Short and long completions in one batch: were ends masked by id, the short ones would never end."""
    tokenizer = pad_is_end.tokenizer
    pairs = [("one:", "1"), ("two:", "22"), ("six:", "666666"), ("ten:", "ten and no more")]
    examples = [encode(Example(origin="x", prompt=one, completion=two), tokenizer) for one, two in pairs]
    tuned = methods.tune(pad_is_end, FullSettings(method="full"), seed=0)
    settings = TrainingSection(max_steps=60, batch_size=4, learning_rate=5e-3, warmup=0.1)
    TrainingLoop(tuned, CompletionObjective(padding_id(tokenizer)), examples, settings).run([Silent()])
    for item, (prompt, completion) in zip(examples, pairs, strict=True):
        asked = torch.tensor([item.token_ids[: item.prompt_length]])
        answer = tuned.model.generate(  # type: ignore[operator]
            input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=24, do_sample=False
        )[0, item.prompt_length :].tolist()
        assert answer == [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id], prompt
