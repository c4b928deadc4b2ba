"""Finds the first of several stop strings in a text that comes in pieces. Knows no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


class StopMatcher:
    """Passes text on up to the stop string that is complete first, and holds back what may be the beginning of one.

    Where several are complete at the same character the longest counts. The outcome does not depend on how the text is
    cut into pieces, and the time is linear in it (Knuth, Morris, Pratt 1977).
    """

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "an empty stop string"
        self._stop = tuple(stop)
        self._borders = [_borders(text) for text in stop]
        self._matched = [0] * len(stop)  # characters of each stop string that the held text ends with
        self._held = ""
        self.met: str | None = None

    def feed(self, text: str) -> str:
        if not self._stop:
            return text
        if self.met is not None:
            return ""
        num_seen = len(self._held)
        self._held += text
        for character in text:
            num_seen += 1
            self.met = self._advance(character)
            if self.met is not None:
                return self._held[: num_seen - len(self.met)]
        num_certain = len(self._held) - max(self._matched, default=0)
        certain, self._held = self._held[:num_certain], self._held[num_certain:]
        return certain

    def flush(self) -> str:
        """What is held back, once no more text comes."""
        rest = "" if self.met is not None else self._held
        self._held = ""
        self._matched = [0] * len(self._stop)
        return rest

    def _advance(self, character: str) -> str | None:
        met = None
        for index, (stop, borders) in enumerate(zip(self._stop, self._borders, strict=True)):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            matched += stop[matched] == character
            self._matched[index] = matched
            if matched == len(stop) and (met is None or len(stop) > len(met)):
                met = stop
        return met


@lru_cache(maxsize=1024)
def _borders(text: str) -> tuple[int, ...]:
    """For each prefix of `text`, the length of the longest proper prefix that is also its suffix."""
    borders = [0]
    for character in text[1:]:
        length = borders[-1]
        while length and text[length] != character:
            length = borders[length - 1]
        borders.append(length + (text[length] == character))
    return tuple(borders)
