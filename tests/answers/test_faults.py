"""Faults of an answer: planted ones are found, in every script, and ordinary text of the bundled set has none."""

from __future__ import annotations

import re

import pytest

from quant_fairness_plugin.answers.faults import find_faults, in_other_script, repeats_itself
from quant_fairness_plugin.answers.prompts import load_prompts
from quant_fairness_plugin.texts.load import load_texts


def naive_loop(text: str) -> bool:
    """The definition, written down as a search: a piece, three times or more, its last time perhaps cut off."""
    text = " ".join(text.split()).casefold()
    for start in range(len(text)):
        for period in range(1, (len(text) - start) // 3 + 1):
            end = start + period
            while end < len(text) and text[end] == text[end - period]:
                end += 1
            if end - start >= max(3 * period, len(text) / 2):
                return True
    return False


@pytest.mark.parametrize(
    "text",
    [
        "It is an invisible, invisible, invisible, invisible, invi",
        "האור האור האור האור האור",
        "我必要在你面前，我必要在你面前，我必要在你面前，",
        "________________________",
        "The sea.\n\nThe sea.\nThe  SEA. The",
    ],
)
def test_a_loop_is_found_in_any_script(text: str) -> None:
    assert repeats_itself(text)
    assert naive_loop(text)


@pytest.mark.parametrize(
    "text",
    [
        "a b",
        "",
        "the king of the land, and the men of the land, and all that was in it",
        "1. Fish\n2. Whales\n3. Crabs\n4. Seals",
        "He said no, no, no, but we went on to the river and over the hills",
    ],
)
def test_what_only_sounds_alike_is_no_loop(text: str) -> None:
    assert not repeats_itself(text)
    assert not naive_loop(text)


def test_a_search_by_the_definition_agrees_on_all_kinds_of_text() -> None:
    pieces = ["ab", "a", "xyz ", "שלום ", "。", "no "]
    texts = [
        head + piece * times + tail
        for piece in pieces
        for times in (2, 3, 5)
        for head, tail in (("", ""), ("word word ", "z"), ("", "q" * 20))
    ]
    assert {repeats_itself(text) for text in texts} == {True, False}
    assert [repeats_itself(text) for text in texts] == [naive_loop(text) for text in texts]


def test_no_sentence_of_the_bundled_texts_is_faulty_as_an_answer_in_its_language() -> None:
    texts, prompts = load_texts("bundled"), load_prompts("bundled")
    assert prompts is not None
    faulty = [
        (language, sentence)
        for language, sentences in texts.sentences.items()
        for sentence in sentences
        if find_faults(sentence, prompts.of(language, chat=True))
    ]
    assert faulty == []


def test_every_language_in_another_script_is_told_from_english() -> None:
    texts, prompts = load_texts("bundled"), load_prompts("bundled")
    assert prompts is not None
    english = texts.sentences["en"][0]
    other = [tag for tag in texts.languages if find_faults(english, prompts.of(tag, chat=True)) == ("other script",)]
    assert other == ["ar", "he", "hi", "ja", "ko", "ru", "zh"]


@pytest.mark.parametrize(
    ("answer", "other"),
    [("42", False), ("カニ", False), ("海の蟹", False), ("Fish and 蟹", True), ("ﬁsh", True), ("１２ 魚", False)],
)
def test_kana_and_characters_are_one_script_and_figures_are_of_none(answer: str, other: bool) -> None:
    assert in_other_script(answer, ["海に住む動物を挙げてください。"]) is other


@pytest.mark.parametrize("answer", ["", "  \n", "…", "\ufffd\ufffd", "!!! ???"])
def test_an_answer_without_a_letter_or_figure_is_empty_and_nothing_else(answer: str) -> None:
    assert find_faults(answer, ["What?"]) == ("empty",)


def test_prompts_do_not_repeat_and_are_as_many_in_every_language() -> None:
    prompts = load_prompts("bundled")
    assert prompts is not None
    assert sorted(prompts.texts) == sorted(load_texts("bundled").languages)
    for chat in (True, False):
        rows = [prompts.of(language, chat=chat) for language in prompts.texts]
        assert {len(row) for row in rows} == {3}
        assert len({text for row in rows for text in row}) == 3 * len(rows)
    assert all(re.search(r"[.?؟。？！।]$", text) for row in prompts.texts for text in prompts.of(row, chat=True))
