from __future__ import annotations

import logging
import unicodedata
from typing import Any

import pytest

from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.texts.sentences import MAX_CHARACTERS, RawTexts, clean_sentence, drop_repeated


def rows(**sentences: tuple[str, ...]) -> RawTexts:
    count = len(next(iter(sentences.values())))
    return RawTexts(
        sentences=sentences,
        ids=tuple(f"r{i}" for i in range(count)),
        parts=tuple("search" if i % 2 else "confirm" for i in range(count)),
        registers=tuple(f"register {i}" for i in range(count)),
    )


def test_decomposed_text_is_composed() -> None:
    assert clean_sentence(unicodedata.normalize("NFD", "Việt é 한국"), "x") == "Việt é 한국"


def test_outer_white_space_goes_and_inner_stays() -> None:
    assert clean_sentence(" \ta\tb\r\nc \u3000\n", "x") == "a\tb\nc"


def test_joiners_and_bidi_marks_are_part_of_a_text() -> None:
    text = "می\u200cخواهم क्\u200dष \u200fשלום"
    assert clean_sentence(text, "x") == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\x00b", r"f line 3: control character U\+0000 in the text"),
        ("a\x1b[31mb", r"f line 3: control character U\+001B"),
        ("a\x0cb", r"f line 3: control character U\+000C"),
        ("\x85a", r"f line 3: control character U\+0085"),
        ("a\rb", r"f line 3: control character U\+000D"),
        ("a\ud800b", r"f line 3: lone surrogate U\+D800"),
        ("caf\ufffd", r"f line 3: replacement character U\+FFFD"),
        ("a\uffffb", r"f line 3: noncharacter U\+FFFF"),
        ("a\ufdd0b", r"f line 3: noncharacter U\+FDD0"),
        ("", r"f line 3: the text is empty; every language needs a sentence"),
        (" \t ", r"f line 3: the text is empty"),
        ("\u200b\ufeff\u2028", r"f line 3: the text is empty"),
        ("a" * (MAX_CHARACTERS + 1), r"f line 3: 1,000,001 characters in one piece; accepted are 1,000,000"),
        (None, r"f line 3: NoneType instead of text"),
        (7, r"f line 3: int instead of text"),
        (["a"], r"f line 3: list instead of text"),
    ],
)
def test_damaged_text_is_refused_with_its_place(text: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        clean_sentence(text, "f line 3")


def test_the_longest_allowed_text_passes() -> None:
    assert len(clean_sentence("a" * MAX_CHARACTERS, "x")) == MAX_CHARACTERS


def test_rows_that_repeat_any_language_are_left_out_in_all_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    raw = rows(en=("a", "b", "c", "a", "e"), he=("v", "w", "w", "y", "z"))
    with caplog.at_level(logging.WARNING):
        kept = drop_repeated(raw, "tiny")
    assert kept.sentences == {"en": ("a", "b", "e"), "he": ("v", "w", "z")}
    assert kept.ids == ("r0", "r1", "r4")
    assert kept.parts == ("confirm", "search", "confirm")
    assert kept.registers == ("register 0", "register 1", "register 4")
    assert "tiny: left out 2 of 5 rows that repeat an earlier one" in caplog.text


def test_a_set_without_repeated_rows_is_returned_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    raw = rows(en=("a", "b"), he=("b", "a"))
    assert drop_repeated(raw, "tiny") is raw
    assert caplog.text == ""
