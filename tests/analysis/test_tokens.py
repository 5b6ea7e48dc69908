"""Fertility by counting with the naked eye; boundaries that follow morphemes, and random ones that do not."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest

from quant_fairness_plugin.analysis.kinds import find_analysis
from quant_fairness_plugin.analysis.request import AnalysisOptions, Request
from quant_fairness_plugin.analysis.segmentation import GOLD, Span, WordCounts, align, count_word, read_gold
from quant_fairness_plugin.analysis.tokens import TokenStatistics, count_sentences, inside, separates_words
from quant_fairness_plugin.artifacts import Bootstrap, Interval, TextSet, Undefined
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.model.resolve import bundled_folder, resolve_model
from quant_fairness_plugin.model.tokenizer import counting_tokenizer
from tests.tiny import byte_tokenizer

BOOTSTRAP = Bootstrap(draws=200)
SENTENCES: dict[str, tuple[str, ...]] = {
    "en": ("two words", "a b c"),
    "he": ("שתי מילים", "אב"),
    "zh": ("两个词", "词"),
}


def texts() -> TextSet:
    return TextSet(
        name="two",
        sentences=SENTENCES,
        ids=("1", "2"),
        parts=("all", "all"),
        registers=("", ""),
        parallel=True,
        sha256="0" * 64,
    )


def test_bytes_as_tokens_are_counted_by_hand(tiny_model: Callable[..., Path]) -> None:
    def refuse() -> None:
        raise AssertionError("a model was loaded")

    request = Request(
        files=resolve_model(str(tiny_model("llama"))),
        texts=texts(),
        config=FairConfig(draws=200),
        options=AnalysisOptions(),
        load=refuse,  # type: ignore[arg-type]
    )
    result = find_analysis("tokens").run(request)
    assert isinstance(result, TokenStatistics)
    en, he, zh = result.languages
    assert [row.per_byte.estimate for row in result.languages] == [1.0, 1.0, 1.0]
    assert he.per_character.estimate == pytest.approx((17 + 4) / (9 + 2), rel=1e-6)
    assert en.per_sentence.estimate == 7.0
    assert isinstance(he.to_reference, Interval)
    assert he.to_reference.estimate == 1.5  # 21 over 14
    assert isinstance(en.per_word, Interval)
    assert en.per_word.estimate == pytest.approx(14 / 5, rel=1e-6)
    assert isinstance(zh.per_word, Undefined)
    assert (en.byte_share.estimate, zh.byte_share.estimate) == (0.0, 1.0)
    assert he.byte_share.estimate == pytest.approx(20 / 21, rel=1e-6)  # all but the space
    assert he.by_sentence.tokens == (17, 4)
    assert [row.language for row in result.alignment] == ["en", "he"]


def test_parts_of_characters_are_found_in_the_quick_tokenizer_too() -> None:
    quick = counting_tokenizer(resolve_model(str(bundled_folder("demo"))))
    whole = byte_tokenizer()
    assert count_sentences(quick, ["plain text"]).parts == (0,)
    assert count_sentences(quick, ["𓀀"]).parts == count_sentences(whole, ["𓀀"]).parts == (4,)


@pytest.mark.parametrize(
    ("tag", "separates"), [("en", 1), ("ko", 1), ("he", 1), ("zh", 0), ("ja", 0), ("th", 0), ("vi", 0)]
)
def test_which_languages_separate_words_by_spaces(tag: str, separates: int) -> None:
    assert separates_words(tag) is bool(separates)


def test_a_tokenizer_that_follows_morphemes_is_perfect() -> None:
    gold = read_gold(GOLD)
    assert {len(words) >= 16 for words in gold.values()} == {True}
    for language, words in gold.items():
        assert len(set(words)) == len(words)
        found = align(language, {"|".join(word): count_word(word, spans(word)) for word in words}, BOOTSTRAP)
        assert isinstance(found.f1, Interval)
        assert isinstance(found.morpheme_share, Interval)
        assert isinstance(found.above_random, Interval)
        assert found.f1.estimate == found.morpheme_share.estimate == 1.0
        assert found.above_random.low > 0


def spans(pieces: tuple[str, ...]) -> list[Span]:
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def test_the_expected_hits_are_the_mean_over_all_segmentations() -> None:
    word = ("un", "happi", "ness")
    every = [cut(11, places) for places in combinations(range(1, 11), 3)]
    counts = [count_word(word, tokens) for tokens in every]
    assert counts[0].expected_hits == pytest.approx(sum(row.hits for row in counts) / len(counts))


def cut(length: int, places: tuple[int, ...]) -> list[Span]:
    return list(zip([0, *places], [*places, length], strict=True))


def test_random_segmentation_comes_to_the_baseline() -> None:
    draw, counts = random.Random(5), dict[str, WordCounts]()
    for number in range(400):
        length, gold = draw.randint(4, 12), draw.randint(1, 3)
        where = sorted(draw.sample(range(1, length), gold))
        morphemes = tuple("x" * (end - start) for start, end in cut(length, tuple(where)))
        places = tuple(sorted(draw.sample(range(1, length), draw.randint(1, 3))))
        counts[str(number)] = count_word(morphemes, cut(length, places))
    found = align("en", counts, BOOTSTRAP)
    assert isinstance(found.above_random, Interval)
    assert found.above_random.low < 0 < found.above_random.high
    assert isinstance(found.random_f1, float)
    assert found.random_f1 > 0.1


def test_boundaries_inside_a_character_never_hit() -> None:
    split = count_word(("ab", "c"), [(0, 2), (2, 3), (2, 3)])
    assert (split.predicted, split.hits, split.morphemes) == (2, 1, 1)
    assert inside([(0, 1), (1, 3), (3, 4)], 1) == [(0, 2), (2, 3)]
    assert inside([(0, 3)], 1) == [(0, 2)]


def test_without_boundaries_nothing_is_made_up() -> None:
    found = align("en", {"a": count_word(("a",), [(0, 1)]), "b": count_word(("b",), [(0, 1)])}, BOOTSTRAP)
    assert isinstance(found.precision, Undefined)
    assert isinstance(found.random_f1, Undefined)
    assert isinstance(align("en", {}, BOOTSTRAP).f1, Undefined)


@pytest.mark.parametrize("line", ["en un|kind", "en\tun||kind", "en\tun kind", "en\ta|b\tc"])
def test_a_bad_line_of_gold_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "gold.tsv"
    path.write_text(f"en\tbook|s\n{line}\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match="line 2"):
        read_gold(path)
