"""Token ids to text as they come: whole characters only, and nothing of a stop string. Knows no model and no request.

`tokenizers.decoders.DecodeStream` (0.23) keeps incomplete text for itself for good and grows without bound on invalid
text, so the window of tokens is kept here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from polyhead_server.engine.stop_strings import StopMatcher

REPLACEMENT = "\ufffd"
_SHORTEN_AT = 8
"""Window length in tokens from which it is shortened to its last characters."""
_FORCE_AT = 64
"""Window length at whose multiples text that never becomes whole is cut, so that the time stays linear."""
_MAX_CONTEXT = 16
"""Tokens of the prompt that are looked at: the longest character and a few special tokens behind it."""


class Decoder(Protocol):
    """What is used of `tokenizers.Tokenizer`, which is a fast tokenizer's `backend_tokenizer`."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class IncrementalDetokenizer:
    """The text of one sequence. The pieces put together are the decoded text of all tokens, cut at a stop string.

    One exception: byte-fallback tokenizers turn every byte of a run that is invalid anywhere into U+FFFD; characters
    that were passed on as whole stay as they were.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = (), prompt_token_ids: Sequence[int] = ()) -> None:
        """`prompt_token_ids`: what the sequence continues; none of its text is passed on."""
        self._decoder = decoder
        self._matcher = StopMatcher(stop)
        # The last tokens, from far enough back to decode what follows.
        self._window: list[int] = self._context(prompt_token_ids)
        # Characters of the window's text that were passed on, or are the prompt's.
        self._num_given = len(self._text(self._window)) if self._window else 0
        self._boundary = len(self._window)  # tokens of the window that end with a whole character

    @property
    def stop(self) -> str | None:
        """The stop string that was met; all text after it is dropped."""
        return self._matcher.met

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that is certain now: whole characters, less what may be the beginning of a stop string."""
        return "".join(self._matcher.feed(self._decode_next(token_id)) for token_id in token_ids)

    def flush(self) -> str:
        """The rest, once no more tokens come; a character that stayed incomplete is U+FFFD."""
        rest = self._text(self._window)[self._num_given :]
        self._window, self._num_given, self._boundary = [], 0, 0
        return self._matcher.feed(rest) + self._matcher.flush()

    def _context(self, token_ids: Sequence[int]) -> list[int]:
        """The fewest last tokens that decode to whole characters: decoders of the SentencePiece kind drop the space
        before a text's first word, and an answer's first word is not a text's."""
        for length in range(1, min(len(token_ids), _MAX_CONTEXT) + 1):
            last = list(token_ids[-length:])
            text = self._text(last)
            if text and REPLACEMENT not in text:
                return last
        return []

    def _text(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=True)

    def _decode_next(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._text(self._window)
        # Trailing replacement characters may yet turn into one whole character.
        whole = text.rstrip(REPLACEMENT)
        piece = whole[self._num_given :]
        self._num_given = max(self._num_given, len(whole))
        if len(whole) < len(text):
            return piece + (self._cut_incomplete(text) if len(self._window) % _FORCE_AT == 0 else "")
        if not piece and text:
            self._window.pop()  # a special token: it adds nothing and is no context
            return ""
        if len(self._window) >= _SHORTEN_AT:
            self._shorten(text)
        self._boundary = len(self._window)
        return piece

    def _shorten(self, text: str) -> None:
        """Leaves the tokens since the last boundary, which decode alone to what they are in the text."""
        context = self._text(self._window[self._boundary :])
        if context and text.endswith(context):
            del self._window[: self._boundary]
            self._num_given = len(context)

    def _cut_incomplete(self, text: str) -> str:
        """Passes on invalid text, but for an end that may still become whole and so starts the new window."""
        for index in range(len(self._window) - 1, len(self._window) - 9, -1):
            head, tail = self._text(self._window[:index]), self._text(self._window[index:])
            if tail and head + tail == text and self._num_given <= len(head):
                piece = text[self._num_given : len(head)]
                del self._window[:index]
                self._num_given = self._boundary = 0
                return piece
        return ""
