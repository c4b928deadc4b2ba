"""From files to token ids with a label mask. Knows no torch."""

from polyhead_trainer.data.encode import encode, expect_form
from polyhead_trainer.data.examples import EncodedData, EncodedExample, Example
from polyhead_trainer.data.load import check_disjoint, load_examples
from polyhead_trainer.data.read import hash_files, read_jsonl

__all__ = [
    "EncodedData",
    "EncodedExample",
    "Example",
    "check_disjoint",
    "encode",
    "expect_form",
    "hash_files",
    "load_examples",
    "read_jsonl",
]
