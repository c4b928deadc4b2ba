"""From files and data sets to token ids with a label mask. Knows no torch."""

from polyhead_trainer.data.encode import encode, expect_form
from polyhead_trainer.data.examples import EncodedData, EncodedExample, Example
from polyhead_trainer.data.load import check_disjoint, load_examples
from polyhead_trainer.data.read import parse_row, read_examples
from polyhead_trainer.data.rows import Row, Source
from polyhead_trainer.data.sources import hash_sources, open_sources
from polyhead_trainer.data.stream import ExampleStream

__all__ = [
    "EncodedData",
    "EncodedExample",
    "Example",
    "ExampleStream",
    "Row",
    "Source",
    "check_disjoint",
    "encode",
    "expect_form",
    "hash_sources",
    "load_examples",
    "open_sources",
    "parse_row",
    "read_examples",
]
