"""A language that the tokenizer cannot spell gets no figure to believe; one that it spells in bytes is as any other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quant_fairness_plugin.artifacts import Bootstrap, StateScores
from quant_fairness_plugin.measure.damage import measure_damage
from quant_fairness_plugin.measure.guards import UNKNOWN_SHARE, spelling
from quant_fairness_plugin.measure.rows import tokenize
from tests.measure.samples import make_scores, numbered_texts
from tests.tiny import byte_tokenizer

TEXTS = numbered_texts(20)
BEFORE = make_scores("16 bit", TEXTS, {"en": 1.0, "he": 1.0, "ar": 1.0})
AFTER = make_scores(
    "none", TEXTS, {"en": 1.1, "he": 1.2, "ar": 1.3}, kl_bits_per_byte={"en": 0.1, "he": 0.2, "ar": 0.3}
)


def without_spelling(share: float) -> StateScores:
    he = BEFORE.languages["he"]
    return replace(BEFORE, languages=BEFORE.languages | {"he": replace(he, unknown=round(share * sum(he.tokens)))})


@pytest.mark.parametrize(("share", "status"), [(0.0, "supported"), (0.05, "supported"), (0.8, "unsupported")])
def test_a_language_of_unknown_tokens_is_unsupported_however_well_they_are_predicted(share: float, status: str) -> None:
    damage = measure_damage(without_spelling(share), AFTER, TEXTS, vocabulary=4096, bootstrap=Bootstrap(draws=100))
    assert [row.status for row in damage] == ["supported", status, "supported"]
    if status == "unsupported":
        assert damage[1].reason == "80% of its tokens stand for text that the tokenizer cannot spell"


def test_the_bound_itself_is_still_spelling() -> None:
    assert spelling(round(100 * UNKNOWN_SHARE), 100) is None
    assert spelling(round(100 * UNKNOWN_SHARE) + 1, 100) is not None


def test_unknown_tokens_are_counted_and_bytes_are_not() -> None:
    tokenizer = byte_tokenizer()
    rows = tokenize(tokenizer, TEXTS, context=256)
    bytewise = rows.state_scores("x", rows.empty_totals()).languages
    assert [bytewise[language].unknown for language in TEXTS.languages] == [0, 0, 0]
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(tokenizer(" ", add_special_tokens=False)["input_ids"][0])
    rows = tokenize(tokenizer, TEXTS, context=256)
    counted = rows.state_scores("x", rows.empty_totals()).languages
    assert counted["en"].unknown == sum(sentence.count(" ") for sentence in TEXTS.sentences["en"]) > 0
