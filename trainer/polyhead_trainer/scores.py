"""Scores of generated answers against references: plain functions of texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

CHRF_ORDER = 6
CHRF_BETA = 2
_WORD = re.compile(r"[^\W_]+")


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of the answers that equal their reference up to white space around them."""
    return sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True)) / len(references)


def macro_f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Mean over all labels that are there or named of F1 = 2 hits / (named + there): sklearn's macro average."""
    hits = Counter(f for f, w in zip(found, wanted, strict=True) if f == w)
    named, there = Counter(found), Counter(wanted)
    labels = named.keys() | there.keys()
    return sum(2 * hits[label] / (named[label] + there[label]) for label in labels) / len(labels)


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2 in 0..100: F-score (beta = 2) of character n-grams up to 6, white space left out (Popović 2015).

    Counted as sacrebleu does: n-grams are summed over the corpus, orders that nothing is long enough for are skipped.
    """
    precisions, recalls = [], []
    for order in range(1, CHRF_ORDER + 1):
        matches = in_answers = in_references = 0
        for answer, reference in zip(answers, references, strict=True):
            found, wanted = _ngrams(answer, order), _ngrams(reference, order)
            # Where the reference is too short for this order, nothing in the answer could be right: not counted.
            in_answers += found.total() if wanted else 0
            in_references += wanted.total()
            matches += (found & wanted).total()
        if in_answers and in_references:
            precisions.append(matches / in_answers)
            recalls.append(matches / in_references)
    if not precisions:
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    weighted = CHRF_BETA**2 * precision + recall
    return 100 * (1 + CHRF_BETA**2) * precision * recall / weighted if weighted else 0.0


def rouge(answers: Sequence[str], references: Sequence[str]) -> tuple[float, float, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) in 0..100: F1 of a text's words, pairs of words, and longest common
    subsequence of words with its reference, averaged over the texts.

    Words are runs of letters and digits of any script, in lower case, without stemming: on English it is what the
    package rouge-score gives, which has had no release since 2022 and drops every letter outside of a-z.
    """
    pairs = [(_words(answer), _words(reference)) for answer, reference in zip(answers, references, strict=True)]
    totals = (
        sum(_overlap_f1(found, wanted, 1) for found, wanted in pairs),
        sum(_overlap_f1(found, wanted, 2) for found, wanted in pairs),
        sum(_f1(_common_length(found, wanted), len(found), len(wanted)) for found, wanted in pairs),
    )
    one, two, longest = (100 * total / len(pairs) for total in totals)
    return one, two, longest


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _overlap_f1(found: list[str], wanted: list[str], order: int) -> float:
    """Of n-grams, each counted as often as it is in both."""
    ours, theirs = (
        Counter(tuple(words[at : at + order]) for at in range(len(words) - order + 1)) for words in (found, wanted)
    )
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def _f1(num_common: int, num_found: int, num_wanted: int) -> float:
    return 2 * num_common / (num_found + num_wanted) if num_common else 0.0


def _common_length(found: list[str], wanted: list[str]) -> int:
    """Of the longest common subsequence, row by row of the classical table."""
    row = [0] * (len(wanted) + 1)
    for word in found:
        diagonal = 0
        for at, other in enumerate(wanted, start=1):
            above = row[at]
            row[at] = diagonal + 1 if word == other else max(above, row[at - 1])
            diagonal = above
    return row[-1]


def _ngrams(text: str, order: int) -> Counter[str]:
    characters = "".join(text.split())
    return Counter(characters[at : at + order] for at in range(len(characters) - order + 1))
