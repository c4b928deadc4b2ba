"""Every kind of source gives the examples that JSONL gives, and says where a bad record is."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset_builder
from pyarrow import parquet

from polyhead_core.errors import ConfigError
from polyhead_trainer.config import parse_config
from polyhead_trainer.data import Example, hash_sources, read_examples
from polyhead_trainer.errors import DataError
from polyhead_trainer.tasks.classification import labels_of

PAIRS = [
    {"prompt": 'of "two"\nlines, and a comma', "completion": " 007"},
    {"prompt": "NA", "completion": " null"},
    {"prompt": "long " * 30_000, "completion": " ü"},
]
CHAT = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
Records = list[dict[str, Any]]


def write_jsonl(path: Path, records: Records) -> Path:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def write_parquet(path: Path, records: Records) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def write_csv(path: Path, records: Records, encoding: str = "utf-8-sig", **options: Any) -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), **options)
        writer.writeheader()
        writer.writerows(records)
    return path


def contents(*entries: str | Path, columns: dict[str, str] | None = None) -> list[tuple[Any, ...]]:
    """All of the examples but where they are from."""
    found = read_examples(entries, columns or {})
    return [(one.form, one.prompt, one.completion, one.messages, one.rejected) for one in found]


def refusal(*entries: str | Path, columns: dict[str, str] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        contents(*entries, columns=columns)
    return caught.value.message


def test_all_formats_hold_the_same_examples(tmp_path: Path) -> None:
    wanted = contents(write_jsonl(tmp_path / "d.jsonl", PAIRS))
    assert len(wanted) == len(PAIRS)
    assert contents(write_parquet(tmp_path / "d.parquet", PAIRS)) == wanted
    assert contents(write_csv(tmp_path / "d.csv", PAIRS)) == wanted
    assert contents(write_csv(tmp_path / "d.tsv", PAIRS, "utf-8", delimiter="\t")) == wanted
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "saved")
    assert contents(tmp_path / "saved") == wanted
    (tmp_path / "folder").mkdir()
    for number, record in enumerate(PAIRS):
        write_parquet(tmp_path / f"folder/part-{number}.parquet", [record])
    assert contents(tmp_path / "folder") == wanted


def test_conversations_and_preferences_in_typed_tables(tmp_path: Path) -> None:
    pairs = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    for name, records in (("chat", CHAT), ("pairs", pairs)):
        wanted = contents(write_jsonl(tmp_path / f"{name}.jsonl", records))
        assert contents(write_parquet(tmp_path / f"{name}.parquet", records)) == wanted
        Dataset.from_list(records).save_to_disk(tmp_path / name)
        assert contents(tmp_path / name) == wanted


def test_splits_of_directories(tmp_path: Path) -> None:
    whole = DatasetDict({"train": Dataset.from_list(PAIRS[:2]), "test": Dataset.from_list(PAIRS[2:])})
    whole.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    for number, record in enumerate(PAIRS[:2]):
        write_parquet(tmp_path / f"files/train-{number:05}-of-00002.parquet", [record])
    write_csv(tmp_path / "files/test.csv", PAIRS[2:])
    (tmp_path / "files/README.md").write_text("# Pairs")
    wanted = contents(write_jsonl(tmp_path / "d.jsonl", PAIRS))
    for name in ("saved", "files"):
        assert contents(f"{tmp_path}/{name}:train", f"{tmp_path}/{name}:test") == wanted
        assert f"has the splits train, test: name one, as {tmp_path}/{name}:train" in refusal(tmp_path / name)
        assert "no split 'dev'; there are train, test" in refusal(f"{tmp_path}/{name}:dev")
    write_jsonl(tmp_path / "files/odd.jsonl", PAIRS)
    assert "odd.jsonl: of none of the splits train, test" in refusal(f"{tmp_path}/files:train")


def test_classes_are_called_by_their_names(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    reviews = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features)
    reviews.save_to_disk(tmp_path / "saved")
    reviews.to_parquet(tmp_path / "reviews.parquet")
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"text": "a", "label": 3}])
    for source in (tmp_path / "saved", tmp_path / "reviews.parquet"):
        assert [one.reference for one in read_examples([source])] == ["good", "bad", "good"]
        assert labels_of([str(source)], {}) == ["good", "bad"]
    assert [one.reference for one in read_examples([plain])] == ["3"]
    Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features).save_to_disk(tmp_path / "secret")
    assert "secret: row 2: label: class -1 (the classes of this split are not given)" in refusal(tmp_path / "secret")


def test_columns_of_other_names(tmp_path: Path) -> None:
    columns = {"prompt": "question", "completion": "answer"}
    records = [{"id": 1, "question": "q", "answer": "a", "prompt": "no"}]
    ours = write_jsonl(tmp_path / "ours.jsonl", [{"prompt": "p", "completion": "c"}])
    for source in (write_jsonl(tmp_path / "d.jsonl", records), write_parquet(tmp_path / "d.parquet", records)):
        found = list(read_examples([source, ours], columns))
        assert [(one.prompt, one.completion) for one in found] == [("q", "a"), ("p", "c")]
        said = refusal(source, columns={"prompt": "frage", "completion": "answer"})
        assert "1: no 'frage', which data.columns names for 'prompt'; there are 'id', 'question'" in said
        assert "data.columns says which columns hold them" in refusal(source)
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert [(one.prompt, one.completion) for one in read_examples([ours], swapped)] == [("c", "p")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,completion\np,c\np\n", "d.csv:3: 1 values, expected 2, one for each of prompt, completion"),
        ('prompt,completion\n"of\ntwo",c\np,\n', "d.csv:4: completion: must not be empty"),
        ('prompt,completion\np,"c', "d.csv:2: not valid CSV"),
        ("prompt,prompt\np,c\n", "d.csv:1: two columns of one name"),
        ("prompt,answer\np,c\n", "d.csv:2: expected the fields"),
        ("prompt,completion\n", "d.csv holds no examples"),
    ],
)
def test_bad_csv_is_named_by_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "d.csv").write_text(text)
    assert said in refusal(tmp_path / "d.csv")


def test_bad_rows_and_files_are_named(tmp_path: Path) -> None:
    bad = [*PAIRS, {"prompt": "p", "completion": None}]
    said = "row 4: completion: expected a text, got NoneType"
    assert f"d.parquet: {said}" in refusal(write_parquet(tmp_path / "d.parquet", bad))
    Dataset.from_list(bad).save_to_disk(tmp_path / "saved")
    assert f"saved: {said}" in refusal(tmp_path / "saved")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "d.parquet").read_bytes()[:-9])
    assert "torn.parquet: not a readable Parquet file" in refusal(tmp_path / "torn.parquet")
    (tmp_path / "latin.csv").write_bytes(b"prompt,completion\np,\xfc\n")
    assert "latin.csv:2: not UTF-8" in refusal(tmp_path / "latin.csv")
    (tmp_path / "d.xlsx").touch()
    assert "d.xlsx: unknown format '.xlsx': expected a file that ends in .jsonl" in refusal(tmp_path / "d.xlsx")
    assert "no directory" in refusal(tmp_path / "absent:train")
    assert "absent.csv" in refusal(tmp_path / "absent.csv")
    (tmp_path / "empty").mkdir()
    assert "empty holds no data files" in refusal(tmp_path / "empty")
    assert "hub:a:b:c:d: expected hub:NAME" in refusal("hub:a:b:c:d")


def test_the_identity_of_the_data_is_their_content(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = write_parquet(tmp_path / "folder/d.parquet", PAIRS)
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "saved")
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "again")
    Dataset.from_list(PAIRS[:2]).save_to_disk(tmp_path / "other")
    assert hash_sources([file]) == hash_sources([tmp_path / "folder"])
    assert hash_sources([tmp_path / "saved"]) == hash_sources([tmp_path / "again"])
    distinct = {hash_sources([tmp_path / name]) for name in ("folder", "saved", "other")}
    write_parquet(file, PAIRS[:2])
    assert len(distinct | {hash_sources([file])}) == 4


def test_columns_are_for_one_whole_form() -> None:
    values = {"output": "out", "data": {"train": ["a"], "held_out": ["b"]}, "training": {"epochs": 1}}
    config = parse_config(values, "x", ["data.columns.prompt=q", "data.columns.completion=a"])
    assert config.data.columns == {"prompt": "q", "completion": "a"}
    with pytest.raises(ConfigError, match="a column for every field of one form: prompt and completion; text and"):
        parse_config(values, "x", ['data.columns={prompt = "q", label = "a"}'])


ASK_THE_HUB = """
import sys
from polyhead_trainer.data import hash_sources, read_examples
from polyhead_trainer.errors import DataError
for entry in sys.argv[1:]:
    try:
        found = [example.prompt for example in read_examples([entry])]
        print(*found, len(hash_sources([entry])))
    except DataError as error:
        print(error.message.replace(chr(10), " "))
"""


def test_data_sets_of_the_hub_come_from_the_cache_where_the_hub_is_out_of_reach(tmp_path: Path) -> None:
    """The cache is what the library itself makes for a local file, under the name of a data set of the hub."""
    file = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"p{n}", "completion": "c"} for n in range(10)])
    builder = load_dataset_builder("json", data_files={"train": str(file)}, cache_dir=str(tmp_path / "made"))
    builder.download_and_prepare()
    made, home = Path(builder.cache_dir), tmp_path / "home"
    cached = home / "datasets/someone___colours/small" / made.parent.name / made.name
    cached.parent.mkdir(parents=True)
    made.rename(cached)
    (cached / "json-train.arrow").rename(cached / "colours-train.arrow")
    info = (cached / "dataset_info.json").read_text().replace('"json"', '"colours"')
    (cached / "dataset_info.json").write_text(info.replace('"config_name": "default"', '"config_name": "small"'))
    entries = ["hub:someone/colours", "hub:someone/colours:train[:20%]", "hub:someone/colours:small:train[8:]"]
    entries += ["hub:someone/colours:test", "hub:someone/shapes:train"]
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-c", ASK_THE_HUB, *entries]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    whole, first, last, no_split, absent = done.stdout.splitlines()
    assert whole == " ".join(f"p{n}" for n in range(10)) + " 64"
    assert first == "p0 p1 64"
    assert last == "p8 p9 64"
    assert no_split.startswith("hub:someone/colours:test: cannot load this data set from the hub or the cache: ")
    assert "test" in no_split.partition("cache: ")[2]
    assert absent.startswith("hub:someone/shapes:train: cannot load this data set from the hub or the cache: ")
    assert "a hub that can be reached" in absent


def test_an_example_says_where_it_is_from(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "d.csv", PAIRS)
    found: list[Example] = list(read_examples([file]))
    assert [one.origin for one in found] == [f"{file}:2", f"{file}:4", f"{file}:5"]


def test_a_folders_name_is_no_pattern(tmp_path: Path) -> None:
    for name, text in (("set*", "mine"), ("set1", "another's"), ("data [v2]", "second"), ("where?", "third")):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [{"prompt": text, "completion": "c"}])
    for name, text in (("set*", "mine"), ("data [v2]", "second"), ("where?", "third")):
        assert [prompt for _, prompt, *_ in contents(tmp_path / name)] == [text]


def test_a_table_whose_texts_are_no_utf_8_is_refused(tmp_path: Path) -> None:
    offsets, bad = pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")
    prompts = pyarrow.StringArray.from_buffers(1, offsets, bad)
    parquet.write_table(pyarrow.table({"prompt": prompts, "completion": ["c"]}), tmp_path / "d.parquet")
    assert "d.parquet: not a readable Parquet file: 'utf-8' codec" in refusal(tmp_path / "d.parquet")
