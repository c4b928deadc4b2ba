"""A run's examples as its settings want them: training examples held in memory or streamed, held-out ones held."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyhead_trainer.config import DataSection
from polyhead_trainer.data import EncodedData, EncodedExample, Example, ExampleStream, check_disjoint, load_examples
from polyhead_trainer.data.load import Encoding
from polyhead_trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from polyhead_core.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class RunData:
    train: EncodedData | ExampleStream
    held_out: EncodedData

    @property
    def examples(self) -> list[EncodedExample] | ExampleStream:
        """To learn from."""
        return self.train if isinstance(self.train, ExampleStream) else self.train.examples

    def sample(self) -> Iterable[EncodedExample]:
        """All training examples, or of a stream the first ones."""
        return self.train.sample() if isinstance(self.train, ExampleStream) else self.train.examples

    @property
    def stream(self) -> ExampleStream | None:
        return self.train if isinstance(self.train, ExampleStream) else None


def open_data(settings: DataSection, backbone: Backbone, encoding: Encoding) -> RunData:
    """`encoding`: the task's. Raises DataError, also where a held-out example is learned too."""
    tokenizer = backbone.tokenizer
    encoding = _within_positions(encoding, backbone, settings.max_length)
    held_out = load_examples(settings.held_out, tokenizer, settings.max_length, encoding, settings.columns)
    if settings.streaming:
        stream = ExampleStream(
            settings.train,
            lambda example: encoding(example, tokenizer),
            max_length=settings.max_length,
            buffer_size=settings.shuffle_buffer,
            columns=settings.columns,
        )
        stream.check(held_out.examples)
        return RunData(train=stream, held_out=held_out)
    train = load_examples(settings.train, tokenizer, settings.max_length, encoding, settings.columns)
    check_disjoint(train.examples, held_out.examples)
    return RunData(train=train, held_out=held_out)


def _within_positions(encoding: Encoding, backbone: Backbone, max_length: int) -> Encoding:
    """As `encoding`; raises DataError too for an example that max_length admits, and the backbone has no positions for:
    learned ones end there, and rotary ones were never trained beyond."""
    config = backbone.model.config
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit >= max_length:
        return encoding

    def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> EncodedExample:
        encoded = encoding(example, tokenizer)
        longest = encoded.width
        if config.is_encoder_decoder:  # each side has positions of its own
            longest = max(encoded.prompt_length, len(encoded.token_ids) - encoded.prompt_length)
        if limit < longest and encoded.width <= max_length:
            raise DataError(
                f"{example.origin}: {longest} tokens, and the backbone is made for {limit}: set data.max_length "
                f"= {limit}, which leaves longer examples out"
            )
        return encoded

    return encode
