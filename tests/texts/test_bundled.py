"""The bundled text set itself, read from the package data alone."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import unicodedata
from collections import Counter
from importlib import resources
from typing import Any

import pytest

from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.texts import documents, load_texts, normalise_language

DATA = resources.files("quant_fairness_plugin.texts") / "bundled"
REQUIRED = ("en", "de", "fr", "es", "he", "ar", "zh", "ja", "ko", "ru", "fi", "vi", "tr", "hi")
CJK = ("CJK",)
KANA = ("HIRAGANA", "KATAKANA")
SCRIPTS: dict[str, tuple[str, ...]] = {
    "he": ("HEBREW",),
    "ar": ("ARABIC",),
    "zh": CJK,
    "ja": (*CJK, *KANA),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "hi": ("DEVANAGARI",),
}
LATIN = ("LATIN",)
# Letters that tell a language from the others of its script; each must be found in many sentences.
OWN_LETTERS = {
    "de": "äöüß",
    "fr": "éèêàçù",
    "es": "áéíóúñ¿¡",
    "fi": "äö",
    "tr": "ığşçöü",
    "vi": "đơưạảấầẩẫậắằẳẵặẹẻẽếềểễệịỉĩọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ",
    "ru": "ыэйщъё",
    "ja": "のはをにが",
    "zh": "的了在们这",
}


@pytest.fixture(scope="module")
def texts() -> TextSet:
    return load_texts("bundled")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "parallel.jsonl").read_text("utf-8").splitlines()]


def script_share(sentences: tuple[str, ...], scripts: tuple[str, ...]) -> float:
    letters = [character for text in sentences for character in text if character.isalpha()]
    return sum(unicodedata.name(character).startswith(scripts) for character in letters) / len(letters)


def all_pairs(texts: TextSet) -> list[tuple[str, str]]:
    return [(language, text) for language, sentences in texts.sentences.items() for text in sentences]


def test_the_checksum_beside_the_file_is_its_own() -> None:
    stored = (DATA / "parallel.sha256").read_text("ascii").split()
    assert stored == [hashlib.sha256((DATA / "parallel.jsonl").read_bytes()).hexdigest(), "parallel.jsonl"]


def test_there_are_at_least_180_sentences_in_14_languages(texts: TextSet) -> None:
    assert set(REQUIRED) <= set(texts.languages)
    assert texts.parallel
    assert len(texts) >= 180
    assert all(len(sentences) == len(texts) for sentences in texts.sentences.values())


def test_nothing_is_left_out_on_loading(texts: TextSet, rows: list[dict[str, Any]]) -> None:
    assert texts.ids == tuple(row["id"] for row in rows)


def test_languages_are_named_by_normalised_tags_english_first(rows: list[dict[str, Any]]) -> None:
    names = [name for name in rows[0] if name not in ("id", "part", "register")]
    assert names == [normalise_language(name) for name in names]
    assert names == ["en", *sorted(names[1:])]


def test_ids_tell_the_register(texts: TextSet) -> None:
    pairs = list(zip(texts.ids, texts.registers, strict=True))
    assert pairs[:90] == [(f"n{i:03d}", "narrative") for i in range(1, 91)]
    assert pairs[90:180] == [(f"e{i:03d}", "everyday") for i in range(1, 91)]


def test_parts_are_disjoint_and_registers_balanced(texts: TextSet) -> None:
    assert Counter(texts.parts) == {"calibrate": 40, "search": 70, "confirm": 70}
    for part, count in (("calibrate", 20), ("search", 35), ("confirm", 35)):
        assert Counter(texts.part(part).registers) == {"narrative": count, "everyday": count}  # type: ignore[arg-type]
    ids = [texts.part(part).ids for part in ("calibrate", "search", "confirm")]
    assert sorted(sum(ids, ())) == sorted(set(texts.ids))


def test_no_sentence_of_a_language_occurs_twice(texts: TextSet) -> None:
    for language, sentences in texts.sentences.items():
        plain = Counter(re.sub(r"\W", "", text).casefold() for text in sentences)
        assert [text for text, count in plain.items() if count > 1] == [], language


def test_no_sentence_is_empty_or_more_than_one_line(texts: TextSet) -> None:
    bad = [
        (language, text)
        for language, text in all_pairs(texts)
        if len(text) < 4 or text != text.strip() or re.search(r"[\t\n]|  ", text)
    ]
    assert bad == []


def test_the_file_itself_is_in_nfc(rows: list[dict[str, Any]]) -> None:
    assert all(unicodedata.is_normalized("NFC", cell) for row in rows for cell in row.values())


def test_there_are_no_invisible_characters_or_vowel_points(texts: TextSet) -> None:
    invisible = [
        pair for pair in all_pairs(texts) if any(unicodedata.category(c) in ("Cf", "Co", "Cn") for c in pair[1])
    ]
    assert invisible == []
    # Hebrew points and cantillation; Arabic harakat except tanwin fath and shadda, which careful prose writes.
    pointed = [pair for pair in all_pairs(texts) if re.search("[\u0591-\u05c7\u064c-\u0650\u0652\u0670]", pair[1])]
    assert pointed == []


def test_no_line_is_numbered_or_a_note(texts: TextSet) -> None:
    assert [pair for pair in all_pairs(texts) if re.match(r"\s*(\d+[.):\t]|[#*-] )", pair[1])] == []


@pytest.mark.parametrize("language", REQUIRED)
def test_letters_belong_to_the_script_of_the_language(texts: TextSet, language: str) -> None:
    scripts = SCRIPTS.get(language, LATIN)
    assert script_share(texts.sentences[language], scripts) > 0.98
    assert min(script_share((text,), scripts) for text in texts.sentences[language]) > 0.7


@pytest.mark.parametrize("language", sorted(OWN_LETTERS))
def test_letters_of_this_very_language_are_used(texts: TextSet, language: str) -> None:
    own = [any(letter in OWN_LETTERS[language] for letter in text.lower()) for text in texts.sentences[language]]
    assert sum(own) >= 0.3 * len(own)


def test_chinese_holds_no_kana_and_japanese_holds_it_everywhere(texts: TextSet) -> None:
    assert script_share(texts.sentences["zh"], KANA) == 0
    assert all(script_share((text,), KANA) > 0 for text in texts.sentences["ja"])


def test_no_sentence_was_left_in_another_language(texts: TextSet) -> None:
    places: dict[tuple[int, str], list[str]] = {}
    for language, sentences in texts.sentences.items():
        for index, text in enumerate(sentences):
            places.setdefault((index, text), []).append(language)
    assert [(key, languages) for key, languages in places.items() if len(languages) > 1] == []


def standard(lengths: list[int]) -> list[float]:
    mean, deviation = statistics.mean(lengths), statistics.stdev(lengths)
    return [(length - mean) / deviation for length in lengths]


@pytest.mark.parametrize("language", REQUIRED)
def test_no_line_has_slipped(texts: TextSet, language: str) -> None:
    """Lengths follow those of the same line in the other languages, and better than those of the lines beside it.

    Measured over 30 lines, this finds most slips of 20 lines and half of those of 10; the smallest lead of a right file
    over a shifted one was 0.12, the smallest correlation 0.35.
    """
    others = [standard([len(text) for text in rows]) for code, rows in texts.sentences.items() if code != language]
    usual = [statistics.mean(line) for line in zip(*others, strict=True)]
    lengths = [len(text) for text in texts.sentences[language]]
    for start in range(0, len(texts) - 29, 15):
        here, there = usual[start : start + 30], lengths[start : start + 30]
        aligned = statistics.correlation(here, there)
        assert aligned > 0.25
        assert aligned > statistics.correlation(here[1:], there[:-1])
        assert aligned > statistics.correlation(here[:-1], there[1:])


@pytest.mark.parametrize("language", REQUIRED[1:])
@pytest.mark.parametrize("marks", ["[?？؟]|か。$", '["“”„«»「」『』]'], ids=["question", "quotation"])
def test_questions_and_quotations_stand_in_the_same_lines(texts: TextSet, language: str, marks: str) -> None:
    def places(code: str) -> list[str]:
        pairs = zip(texts.ids, texts.sentences[code], strict=True)
        return [row_id for row_id, text in pairs if re.search(marks, text)]

    assert places("en") != []
    assert places(language) == places("en")


def test_the_licence_is_stated_beside_the_data() -> None:
    readme = (DATA / "README.md").read_text("utf-8")
    assert "CC0 1.0" in readme
    assert "examples/build_text_set.py" in readme


def test_documents_are_in_their_language_and_in_every_register(texts: TextSet) -> None:
    rows = [json.loads(line) for line in documents.BUNDLED_DOCUMENTS.read_text("utf-8").strip().split("\n")]
    assert {row["language"] for row in rows} == set(texts.languages)
    for language in texts.languages:
        own = [row for row in rows if row["language"] == language]
        kinds = Counter(row["register"] for row in own)
        assert kinds == {
            "news": 12, "how-to": 10, "informal": 10, "explanation": 10, "question": 6, "technical": 6, "official": 6,
        }  # fmt: skip
        # Letters of the sentences, which were proofread, are those of the documents: code and names are the rest.
        known = {letter for text in texts.sentences[language] for letter in text.lower() if letter.isalpha()}
        found = [letter for row in own for letter in row["text"].lower() if letter.isalpha()]
        share = sum(letter in known for letter in found) / len(found)
        assert share > (0.6 if language in ("zh", "ja", "ko") else 0.95), (language, share)
