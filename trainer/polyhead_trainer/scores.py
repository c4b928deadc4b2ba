"""Scores of generated answers against references: plain functions of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

CHRF_ORDER = 6
CHRF_BETA = 2


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


def _ngrams(text: str, order: int) -> Counter[str]:
    characters = "".join(text.split())
    return Counter(characters[at : at + order] for at in range(len(characters) - order + 1))
