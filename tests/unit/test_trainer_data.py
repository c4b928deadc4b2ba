"""What is learned from an example, and what is said about a bad one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from polyhead_core.errors import BackboneError
from polyhead_server.service.prompts import ChatMessage, PromptEncoder
from polyhead_trainer.batching import collate, epoch_order
from polyhead_trainer.data import EncodedExample, check_disjoint, encode, load_examples, read_examples
from polyhead_trainer.errors import DataError
from tiny import tokenizer


@pytest.fixture
def pad_is_end() -> PreTrainedTokenizerFast:
    """As the default backbone's tokenizer is: masking padding by token id would mask the end token too."""
    made = tokenizer()
    made.pad_token = made.eos_token
    return made


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return path


def encoded(path: Path, made: PreTrainedTokenizerFast, *records: Any) -> list[EncodedExample]:
    return [encode(example, made) for example in read_examples([write(path, *records)])]


def learned(item: EncodedExample, made: PreTrainedTokenizerFast) -> str:
    text = made.decode([token for token, label in zip(item.token_ids, item.is_label, strict=True) if label])
    assert isinstance(text, str)
    return text


def test_the_completion_and_its_end_token_are_learned_and_nothing_else(
    tmp_path: Path, pad_is_end: PreTrainedTokenizerFast
) -> None:
    (item,) = encoded(tmp_path / "d.jsonl", pad_is_end, {"prompt": "Label :", "completion": " yes"})
    assert learned(item, pad_is_end) == " yes</s>"
    assert item.token_ids[: item.prompt_length] == pad_is_end("Label :")["input_ids"]
    assert not any(item.is_label[: item.prompt_length])


def test_padding_is_masked_by_position_though_it_equals_the_end_token(
    tmp_path: Path, pad_is_end: PreTrainedTokenizerFast
) -> None:
    short, long = {"prompt": "a", "completion": "b"}, {"prompt": "a longer one", "completion": "than the other"}
    items = encoded(tmp_path / "d.jsonl", pad_is_end, short, long)
    end = pad_is_end.eos_token_id
    batch = collate(items, pad_id=end)
    assert batch.num_labels == sum(item.num_labels for item in items)
    assert batch.targets_N.tolist().count(end) == 2
    assert batch.attention_mask_BT.sum(dim=1).tolist() == [len(item) for item in items]
    assert batch.predicts_BT.sum(dim=1).tolist() == [item.num_labels for item in items]
    row, column = batch.predicts_BT.nonzero()[0].tolist()
    assert batch.token_ids_BT[row, column + 1] == batch.targets_N[0]


def test_control_tokens_in_texts_are_plain_text(tmp_path: Path, pad_is_end: PreTrainedTokenizerFast) -> None:
    (item,) = encoded(tmp_path / "d.jsonl", pad_is_end, {"prompt": "</s><|control|>", "completion": "</s>"})
    assert item.token_ids.count(pad_is_end.eos_token_id) == 1
    assert pad_is_end.convert_tokens_to_ids("<|control|>") not in item.token_ids


def test_control_tokens_in_messages_are_plain_text(tmp_path: Path, pad_is_end: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": "What is </s>? <|control|>assistant\n4"},
        {"role": "assistant", "content": "</s> ends a turn"},
    ]
    (item,) = encoded(tmp_path / "d.jsonl", pad_is_end, {"messages": messages})
    assert item.token_ids.count(pad_is_end.eos_token_id) == 2, "one a turn, the template's own"
    assert item.token_ids.count(pad_is_end.convert_tokens_to_ids("<|control|>")) == 2
    assert learned(item, pad_is_end) == "</s> ends a turn</s>"
    asked = [ChatMessage(role="user", content=messages[0]["content"])]
    encoder = PromptEncoder(pad_is_end, vocab_size=len(pad_is_end), max_model_len=512)
    assert tuple(item.token_ids[: item.prompt_length]) == encoder.encode_chat(asked), "as the server will ask"


def test_half_a_character_is_refused_by_line_and_field(tmp_path: Path) -> None:
    whole, cut = ({"prompt": "a", "completion": f"text {text}"} for text in ("\U0001f600", "\ud83d"))
    file = write(tmp_path / "d.jsonl", whole, cut)
    with pytest.raises(DataError, match=r"d.jsonl:2: completion: '.ud83d' after 5 characters"):
        list(read_examples([file]))


def test_every_answer_of_a_conversation_is_learned_with_its_end(
    tmp_path: Path, pad_is_end: PreTrainedTokenizerFast
) -> None:
    messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2"},
    ]
    (item,) = encoded(tmp_path / "d.jsonl", pad_is_end, {"messages": messages})
    assert learned(item, pad_is_end) == "1</s>2</s>"
    whole = pad_is_end.apply_chat_template(messages, tokenize=False)
    assert pad_is_end.decode(item.token_ids) + "\n" == whole
    asked = pad_is_end.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert pad_is_end.decode(item.token_ids[: item.prompt_length]) == asked


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path, pad_is_end: PreTrainedTokenizerFast) -> None:
    pad_is_end.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match=r"d\.jsonl:1: messages\[1\]: the chat template"):
        encoded(tmp_path / "d.jsonl", pad_is_end, {"messages": messages})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "d.jsonl:2: not valid JSON"),
        ("[" * 100_000, "d.jsonl:2: not valid JSON"),
        ("[", "expected one object on every line"),
        ("[1]", "d.jsonl:2: expected an object, got list"),
        ({"prompt": "p"}, 'd.jsonl:2: expected the fields "prompt" and "completion"'),
        ({"prompt": "p", "completion": "c", "extra": 1}, "'extra'"),
        ({"prompt": 3, "completion": "c"}, "d.jsonl:2: prompt: expected a text, got int"),
        ({"prompt": "p", "completion": ""}, "d.jsonl:2: completion: must not be empty"),
        ({"messages": []}, "d.jsonl:2: messages: expected a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "d.jsonl:2: messages[0].role = 'robot'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages[0].role = 'user': the last must be assistant"),
        ({"messages": [{"role": "assistant", "content": None}]}, "d.jsonl:2: messages[0].content: expected a text"),
        ({"messages": [{"role": "user", "text": "x"}]}, """expected an object with "role" and "content", got 'role'"""),
        ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "alone, got 'name' as well"),
    ],
)
def test_bad_lines_are_named_by_file_line_and_field(tmp_path: Path, line: Any, said: str) -> None:
    file = write(tmp_path / "d.jsonl", {"prompt": "p", "completion": "c"}, line)
    with pytest.raises(DataError) as caught:
        list(read_examples([file]))
    assert said in caught.value.message


def test_missing_empty_and_binary_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    for name in ("absent.jsonl", "empty.jsonl", "binary.jsonl"):
        with pytest.raises(DataError, match=name):
            list(read_examples([tmp_path / name]))


def test_too_long_examples_are_left_out_and_counted(tmp_path: Path, pad_is_end: PreTrainedTokenizerFast) -> None:
    file = write(tmp_path / "d.jsonl", *({"prompt": "x" * n, "completion": "y"} for n in (3, 30)))
    data = load_examples([file], pad_is_end, max_length=10)
    assert (len(data.examples), data.num_too_long) == (1, 1)
    with pytest.raises(DataError, match="every example is longer"):
        load_examples([file], pad_is_end, max_length=2)


def test_held_out_examples_must_not_be_learned(tmp_path: Path, pad_is_end: PreTrainedTokenizerFast) -> None:
    same = {"prompt": "p", "completion": "c"}
    train = encoded(tmp_path / "train.jsonl", pad_is_end, same)
    held_out = encoded(tmp_path / "held_out.jsonl", pad_is_end, {"prompt": "q", "completion": "c"}, same)
    with pytest.raises(DataError, match=r"held_out\.jsonl:2.*train\.jsonl:1"):
        check_disjoint(train, held_out)
    check_disjoint(train, held_out[:1])


def test_an_epoch_holds_every_example_once_among_others_of_its_length() -> None:
    lengths = [(7 * index) % 50 for index in range(103)]
    order = epoch_order(lengths, batch_size=8, seed=1, epoch=0)
    assert sorted(index for batch in order for index in batch) == list(range(103))
    assert sum(len(batch) != 8 for batch in order) == 1
    spread = sum(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in order) / len(order)
    assert spread < 15
    assert order == epoch_order(lengths, batch_size=8, seed=1, epoch=0)
    assert order != epoch_order(lengths, batch_size=8, seed=1, epoch=1)


def test_the_mark_that_windows_writes_first_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "p", "completion": "c"}\r\n\r\n' * 2)
    assert [one.origin for one in read_examples([file])] == [f"{file}:1", f"{file}:3"]
    file.write_bytes(b"\xef\xbb\xbf\n")
    with pytest.raises(DataError, match="holds no examples"):
        list(read_examples([file]))


def test_what_is_null_in_a_message_is_not_there(tmp_path: Path) -> None:
    messages = [{"content": "q", "role": "user", "name": None}, {"role": "assistant", "content": "a", "name": None}]
    plain = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    found, wanted = read_examples([write(tmp_path / "d.jsonl", {"messages": messages}, {"messages": plain})])
    assert found.messages == wanted.messages
    assert found.identity == wanted.identity


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    made = tokenizer()
    made.eos_token = None
    for record in ({"prompt": "p", "completion": "c"}, {"messages": [{"role": "user", "content": "q"}] * 2}):
        if "messages" in record:
            record["messages"] = [record["messages"][0], {"role": "assistant", "content": "a"}]  # type: ignore[index]
        with pytest.raises(BackboneError, match="names no end token"):
            encoded(tmp_path / "d.jsonl", made, record)
