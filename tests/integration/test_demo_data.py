"""The demo's data: what is read from the packages, and that no text is on both sides of the split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polyhead_trainer.demo_data import prepare
from polyhead_trainer.demo_data.catalogue import translations

CATALOGUE = """# header
msgid ""
msgstr "Language: fr\\n"

#: views.py:3
msgid "Save"
msgstr "Enregistrer"

msgctxt "verb"
msgid ""
"Two "
"parts"
msgstr "Deux \\"parties\\""

#, fuzzy
msgid "Unsure"
msgstr "Incertain"

msgid "Untranslated"
msgstr ""

msgid "%d day"
msgid_plural "%d days"
msgstr[0] "%d jour"
msgstr[1] "%d jours"

#~ msgid "Obsolete"
#~ msgstr "Obsolète"
"""


def test_catalogues_give_finished_entries_alone() -> None:
    assert list(translations(CATALOGUE)) == [("Save", "Enregistrer"), ("Two parts", 'Deux "parties"')]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("data")
    notes = prepare(output)
    assert any("MIT" in note for note in notes)
    assert any("BSD-3-Clause" in note for note in notes)
    return output


def lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("task", "least"), [("tweet_sentiment", (3700, 400)), ("ui_spanish", (800, 100))])
def test_the_sides_of_the_split_share_no_text(prepared: Path, task: str, least: tuple[int, int]) -> None:
    train, held_out = (lines(prepared / task / f"{side}.jsonl") for side in ("train", "held_out"))
    assert (len(train) >= least[0], len(held_out) >= least[1]) == (True, True)
    assert not {item["prompt"].casefold() for item in train} & {item["prompt"].casefold() for item in held_out}


def test_tweets_have_the_form_of_the_task(prepared: Path) -> None:
    for item in lines(prepared / "tweet_sentiment" / "train.jsonl"):
        assert item["prompt"].startswith("Tweet text : ")
        assert item["prompt"].endswith(" Label :")
        assert item["completion"] in (" positive", " negative", " neutral")


def test_the_same_packages_give_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    prepare(tmp_path)
    for file in prepared.rglob("*"):
        if file.is_file():
            assert (tmp_path / file.relative_to(prepared)).read_bytes() == file.read_bytes(), file


def test_the_licences_lie_beside_the_data(prepared: Path) -> None:
    assert "The MIT License" in (prepared / "vaderSentiment-3.3.2.LICENSE.txt").read_text()
    assert "Django Software Foundation" in (prepared / "Django-5.2.LICENSE.txt").read_text()
    assert len((prepared / "general_text.txt").read_text()) > 500_000
