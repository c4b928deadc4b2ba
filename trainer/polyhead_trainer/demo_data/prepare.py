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

LABEL_THRESHOLD = 0.5
"""Mean ratings (of 20 people, -4 to 4) at least this far from 0 are positive or negative."""
MAX_TRANSLATED_CHARACTERS = 80
NOT_PLAIN = re.compile(r"[%{<\n]")
"""Texts with placeholders, markup or several lines are left out."""

SPANISH = ("es", "es_AR", "es_CO", "es_MX", "es_VE")
"""Locales of one language: all their translations are learned, and measured against the first one's."""

Pair = tuple[str, str]


def prepare(output: Path, cache_dir: Path | None = None) -> list[str]:
    """Writes the files below `output`; returns lines that say what they are. Raises BackboneError where pip fails."""
    cache = cache_dir or default_cache_dir()
    vader, django = VADER.open(cache), DJANGO.open(cache)
    ratings = vader.inner("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    output.mkdir(parents=True, exist_ok=True)
    notes = [
        _write_task(output / "tweet_sentiment", tweet_pairs(ratings), held_out_share=0.1),
        _write_task(output / "ui_spanish", catalogue_pairs(django, SPANISH, "Spanish"), held_out_share=0.2),
        _write_general_text(output / "general_text.txt", ratings),
    ]
    for package, files in ((VADER, vader), (DJANGO, django)):
        name = f"{package.name}-{package.version}.LICENSE.txt"
        (output / name).write_text(files.text(package.license_member), encoding="utf-8")
        notes.append(f"source: {package.name} {package.version} from PyPI, {package.license_name}: {output / name}")
    return notes


def tweet_pairs(ratings: PackageFiles) -> list[Pair]:
    """4,200 tweets with people's mean rating of their sentiment (Hutto and Gilbert, ICWSM 2014)."""
    pairs = []
    for _, rating, text in _rows(ratings, "tweets_GroundTruth.txt"):
        label = "neutral"
        if abs(float(rating)) >= LABEL_THRESHOLD:
            label = "positive" if float(rating) > 0 else "negative"
        pairs.append((f"Tweet text : {html.unescape(text).strip()} Label :", f" {label}"))
    return pairs


def catalogue_pairs(django: PackageFiles, locales: Iterable[str], language: str) -> list[Pair]:
    """Short texts of Django's user interface with their translations by Django's translators."""
    found: dict[Pair, None] = {}
    for locale in locales:
        for name in django.names(f"/locale/{locale}/LC_MESSAGES/django.po"):
            for source, translation in translations(django.text(name)):
                # A reader cannot see whether a space breaks.
                plain = translation.replace("\u00a0", " ")
                is_short = len(source) <= MAX_TRANSLATED_CHARACTERS
                if is_short and source != plain and not NOT_PLAIN.search(source + plain):
                    found[(f"English : {source} {language} :", f" {plain}")] = None
    return list(found)


def _rows(ratings: PackageFiles, file: str) -> Iterable[list[str]]:
    (name,) = ratings.names(file)
    return (line.split("\t") for line in ratings.text(name).splitlines())


def _write_general_text(file: Path, ratings: PackageFiles) -> str:
    text = "\n".join(row[2] for row in _rows(ratings, "nytEditorialSnippets_GroundTruth.txt"))
    file.write_text(text + "\n", encoding="utf-8")
    return f"{file}: sentences of New York Times editorials, {len(text):,} characters"


def _write_task(folder: Path, pairs: Iterable[Pair], held_out_share: float) -> str:
    folder.mkdir(exist_ok=True)
    # By hash, so that the first few are a fair sample; stable, so that of one prompt the first completion comes first.
    placed = sorted(((_place(pair[0]), pair) for pair in pairs), key=lambda item: item[0])
    train = [pair for place, pair in placed if int(place[:8], 16) >= held_out_share * 2**32]
    held_out: dict[str, str] = {}
    for place, (prompt, completion) in placed:
        if int(place[:8], 16) < held_out_share * 2**32:
            held_out.setdefault(prompt, completion)
    for side, chosen in (("train", train), ("held_out", list(held_out.items()))):
        lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) for p, c in chosen]
        (folder / f"{side}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{folder}: {len(train):,} examples to learn, {len(held_out):,} held out"


def _place(prompt: str) -> str:
    """A hash that near copies share (case, punctuation, links and names apart), so that they are on the same side."""
    core = re.sub(r"https?://\S+|@\w+|\brt\b|[^\w\s]", " ", prompt.casefold())
    return hashlib.sha256(" ".join(core.split()).encode()).hexdigest()
