"""Scores of answers; the chrF figures are sacrebleu 2.5's (`corpus_chrf`)."""

from __future__ import annotations

import pytest

from polyhead_trainer.scores import chrf, exact_match


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
