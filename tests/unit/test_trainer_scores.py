"""Scores of answers; the chrF figures are sacrebleu 2.5's (`corpus_chrf`), ROUGE's those of rouge-score."""

from __future__ import annotations

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from polyhead_trainer.scores import chrf, exact_match, rouge


def test_exact_match_ignores_white_space_around_the_answer() -> None:
    assert exact_match([" yes\n", "no", "Yes"], ["yes", " no", "yes"]) == pytest.approx(2 / 3)


def test_chrf_equals_sacrebleu() -> None:
    answers = ["Supprimer l'utilisateur", "Demain matin", ""]
    references = ["Supprimer l’utilisateur ?", "Demain", "Aujourd’hui"]
    assert chrf(answers, references) == pytest.approx(60.636814804395314)


def test_chrf_runs_from_nothing_to_all() -> None:
    assert chrf(["abc def"], ["abc def"]) == pytest.approx(100)
    assert chrf([""], ["abc"]) == 0
    assert chrf(["xyz"], ["abc"]) == 0


def test_rouge_equals_rouge_score_on_english() -> None:
    draw = random.Random(0)
    words = ["the", "The", "cat", "sat,", "on", "a", "mat.", "it's", "2", "dogs-and-cats", "!"]
    texts = [" ".join(draw.choices(words, k=draw.randrange(0, 12))) for _ in range(200)]
    answers, references = texts[:100], texts[100:]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    theirs = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    wanted = [100 * sum(one[name].fmeasure for one in theirs) / 100 for name in ("rouge1", "rouge2", "rougeL")]
    assert rouge(answers, references) == pytest.approx(wanted)
    assert len({round(value, 3) for value in wanted}) == 3


def test_rouge_reads_words_of_every_script() -> None:
    assert rouge(["Año nuevo"], ["año Nuevo!"]) == pytest.approx((100, 100, 100))
    assert rouge(["año"], ["ano"]) == (0, 0, 0)
    assert rouge([""], [""]) == (0, 0, 0)
