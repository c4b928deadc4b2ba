"""Makes the demo's JSONL files. Which side of the split an example is on depends on its text alone."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterable
from pathlib import Path

from polyhead_core.paths import default_cache_dir
from polyhead_trainer.demo_data.catalogue import translations
from polyhead_trainer.demo_data.sources import DJANGO, VADER, PackageFiles
from polyhead_trainer.storage import writing

LABEL_THRESHOLD = 0.5
"""Mean ratings (of 20 people, -4 to 4) at least this far from 0 are positive or negative."""
MAX_TRANSLATED_CHARACTERS = 80
NOT_PLAIN = re.compile(r"[%{<\n]")
"""Texts with placeholders, markup or several lines are left out."""

SPANISH = ("es", "es_AR", "es_CO", "es_MX", "es_VE")
"""Locales of one language: all their translations are learned, and measured against the first one's."""

Pair = tuple[str, str]
Record = dict[str, str]
"""One line of a file; its first field is the text that decides on which side of the split it is."""


def prepare(output: Path, cache_dir: Path | None = None) -> list[str]:
    """Writes the files below `output`; returns lines that say what they are.

    Raises BackboneError where pip fails, StorageFailed.
    """
    cache = cache_dir or default_cache_dir()
    vader, django = VADER.open(cache), DJANGO.open(cache)
    with writing(output, "it is not complete"):
        return _write(output, vader, django)


def _write(output: Path, vader: PackageFiles, django: PackageFiles) -> list[str]:
    ratings = vader.inner("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    output.mkdir(parents=True, exist_ok=True)
    notes = [
        _write_task(output / "tweet_sentiment", as_completions(tweet_pairs(ratings)), held_out_share=0.1),
        _write_task(output / "tweet_labels", as_labelled_texts(tweets(ratings)), held_out_share=0.1),
        _write_task(output / "ui_spanish", as_completions(catalogue_pairs(django, SPANISH)), held_out_share=0.2),
        _write_task(output / "ui_argentinian", argentinian_preferences(django), held_out_share=0.2),
        _write_general_text(output / "general_text.txt", ratings),
    ]
    for package, files in ((VADER, vader), (DJANGO, django)):
        name = f"{package.name}-{package.version}.LICENSE.txt"
        (output / name).write_text(files.text(package.license_member), encoding="utf-8")
        notes.append(f"source: {package.name} {package.version} from PyPI, {package.license_name}: {output / name}")
    return notes


def tweets(ratings: PackageFiles) -> list[Pair]:
    """(text, label) of 4,200 tweets with people's mean rating of their sentiment (Hutto and Gilbert, ICWSM 2014)."""
    pairs = []
    for _, rating, text in _rows(ratings, "tweets_GroundTruth.txt"):
        label = "neutral"
        if abs(float(rating)) >= LABEL_THRESHOLD:
            label = "positive" if float(rating) > 0 else "negative"
        pairs.append((html.unescape(text).strip(), label))
    return pairs


def tweet_pairs(ratings: PackageFiles) -> list[Pair]:
    return [(f"Tweet text : {text} Label :", f" {label}") for text, label in tweets(ratings)]


def catalogue_pairs(django: PackageFiles, locales: Iterable[str]) -> list[Pair]:
    """Short texts of Django's user interface with their Spanish translations by Django's translators."""
    found: dict[Pair, None] = {}
    for locale in locales:
        for name in django.names(f"/locale/{locale}/LC_MESSAGES/django.po"):
            for source, translation in translations(django.text(name)):
                # A reader cannot see whether a space breaks.
                plain = translation.replace("\u00a0", " ")
                is_short = len(source) <= MAX_TRANSLATED_CHARACTERS
                if is_short and source != plain and not NOT_PLAIN.search(source + plain):
                    found[(f"English : {source} Spanish :", f" {plain}")] = None
    return list(found)


def argentinian_preferences(django: PackageFiles) -> list[Record]:
    """The Argentinian translation as the better one where Spain's is another: usage, capitals, forms of address."""
    spain = dict(catalogue_pairs(django, ["es"]))
    return [
        {"prompt": prompt, "chosen": translation, "rejected": spain[prompt]}
        for prompt, translation in dict(catalogue_pairs(django, ["es_AR"])).items()
        if spain.get(prompt, translation) != translation
    ]


def as_completions(pairs: Iterable[Pair]) -> list[Record]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def as_labelled_texts(pairs: Iterable[Pair]) -> list[Record]:
    return [{"text": text, "label": label} for text, label in pairs]


def _rows(ratings: PackageFiles, file: str) -> Iterable[list[str]]:
    (name,) = ratings.names(file)
    return (line.split("\t") for line in ratings.text(name).splitlines())


def _write_general_text(file: Path, ratings: PackageFiles) -> str:
    text = "\n".join(row[2] for row in _rows(ratings, "nytEditorialSnippets_GroundTruth.txt"))
    file.write_text(text + "\n", encoding="utf-8")
    return f"{file}: sentences of New York Times editorials, {len(text):,} characters"


def _write_task(folder: Path, records: Iterable[Record], held_out_share: float) -> str:
    folder.mkdir(exist_ok=True)
    # By hash, so that the first few are a fair sample; stable, so that of one prompt the first completion comes first.
    placed = sorted(((_place(_text(record)), record) for record in records), key=lambda item: item[0])
    train = [record for place, record in placed if int(place[:8], 16) >= held_out_share * 2**32]
    held_out: dict[str, Record] = {}
    for place, record in placed:
        if int(place[:8], 16) < held_out_share * 2**32:
            held_out.setdefault(_text(record), record)
    for side, chosen in (("train", train), ("held_out", list(held_out.values()))):
        lines = [json.dumps(record, ensure_ascii=False) for record in chosen]
        (folder / f"{side}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{folder}: {len(train):,} examples to learn, {len(held_out):,} held out"


def _text(record: Record) -> str:
    return next(iter(record.values()))


def _place(prompt: str) -> str:
    """A hash that near copies share (case, punctuation, links and names apart), so that they are on the same side."""
    core = re.sub(r"https?://\S+|@\w+|\brt\b|[^\w\s]", " ", prompt.casefold())
    return hashlib.sha256(" ".join(core.split()).encode()).hexdigest()
