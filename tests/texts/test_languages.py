from __future__ import annotations

import re
from typing import Any

import pytest

from quant_fairness_plugin.errors import ConfigError, UnknownLanguageError
from quant_fairness_plugin.texts.languages import choose_languages, normalise_language

HELD = ("en", "he", "zh")


def choose(languages: Any = None, reference: str | None = "en") -> tuple[str, ...]:
    return choose_languages(HELD, languages=languages, reference=reference, source="tiny")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("en", "en"),
        (" EN ", "en"),
        ("eng", "en"),
        ("en-US", "en"),
        ("en_GB", "en-GB"),
        ("ger", "de"),
        ("pt-BR", "pt"),
        ("pt-PT", "pt-PT"),
        ("en-fonipa", "en-fonipa"),
    ],
)
def test_codes_and_regions_get_one_spelling(written: str, expected: str) -> None:
    assert normalise_language(written) == expected


@pytest.mark.parametrize(
    ("written", "expected"), [("iw", "he"), ("heb", "he"), ("in", "id"), ("ji", "yi"), ("mo", "ro")]
)
def test_deprecated_tags_become_the_current_one(written: str, expected: str) -> None:
    assert normalise_language(written) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("zh", "zh"),
        ("zho", "zh"),
        ("cmn", "zh"),
        ("zh-CN", "zh"),
        ("zh-Hans", "zh"),
        ("ar", "ar"),
        ("arb", "ar"),
        ("arb_Arab", "ar"),
        ("arz", "arz"),
        ("no", "no"),
        ("nor", "no"),
        ("nb", "nb"),
    ],
)
def test_macro_languages_hold_their_standard_member_and_no_other(written: str, expected: str) -> None:
    assert normalise_language(written) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("zh-Hant", "zh-Hant"),
        ("zh_TW", "zh-Hant"),
        ("zh-HK", "zh-HK"),
        ("sr", "sr"),
        ("sr-Cyrl", "sr"),
        ("sr-Latn", "sr-Latn"),
    ],
)
def test_a_script_is_kept_unless_it_is_the_likely_one(written: str, expected: str) -> None:
    assert normalise_language(written) == expected


@pytest.mark.parametrize("tag", ["eng", "zh-HK", "sr-Latn", "pt-PT", "zh_TW", "nb", "fa-AF"])
def test_normalising_twice_changes_nothing(tag: str) -> None:
    assert normalise_language(normalise_language(tag)) == normalise_language(tag)


@pytest.mark.parametrize(
    "written", ["english", "xx", "", "en-", "und", "mul", "zxx", "mis", "x-foo", "he\u200e", "a" * 100_000, None, 3]
)
def test_what_is_no_language_is_refused_on_one_short_line(written: Any) -> None:
    with pytest.raises(UnknownLanguageError, match="is not the tag of a language; use BCP 47") as caught:
        normalise_language(written)
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


def test_all_languages_are_chosen_unless_some_are_asked_for() -> None:
    assert choose() == HELD


def test_languages_come_in_the_order_asked_for_and_normalised() -> None:
    assert choose(["cmn", "eng"]) == ("zh", "en")


def test_a_language_that_is_not_held_names_those_that_are() -> None:
    with pytest.raises(UnknownLanguageError, match=re.escape("no sentences in sw; it holds en, he, zh.")):
        choose(["en", "swa"])


def test_another_script_of_a_held_language_is_not_taken_for_it() -> None:
    with pytest.raises(UnknownLanguageError, match=re.escape("no sentences in zh-Hant; it holds en, he, zh.")):
        choose(["en", "zh-Hant"])


def test_one_string_is_not_a_list_of_letters() -> None:
    with pytest.raises(ConfigError, match=re.escape("languages is the string 'he'; give a list")):
        choose("he")


def test_no_language_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="the list of languages is empty"):
        choose([], None)


def test_one_language_under_two_tags_is_refused() -> None:
    with pytest.raises(ConfigError, match="language he is listed more than once"):
        choose(["en", "he", "iw"])


def test_a_reference_outside_the_languages_is_refused_with_the_ways_out() -> None:
    with pytest.raises(ConfigError, match=re.escape("'en' is not among the languages he, zh.")) as caught:
        choose(["he", "zh"])
    assert "--reference LANG|none" in str(caught.value)
    assert not isinstance(caught.value, UnknownLanguageError)


def test_without_a_reference_no_language_has_to_be_there() -> None:
    assert choose(["he", "zh"], None) == ("he", "zh")


def test_the_reference_may_be_written_in_any_spelling() -> None:
    assert choose(["he", "zh"], "iw") == ("he", "zh")


def test_a_reference_that_is_no_language_is_refused() -> None:
    with pytest.raises(UnknownLanguageError, match="'none' is not the tag of a language"):
        choose(["en"], "none")
