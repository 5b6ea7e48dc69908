from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quant_fairness_plugin.artifacts import Undefined
from quant_fairness_plugin.errors import ConfigError, UnknownLanguageError
from quant_fairness_plugin.seeds.disparity import (
    DISPARITY_FORMULAS,
    Fallback,
    Groups,
    disparity,
    perplexities,
    perplexity,
)
from quant_fairness_plugin.seeds.texts import DEFAULT_TEXTS, SERIES_TEXTS

# Published degradations in percent of GPT-2 under per-tensor INT4 (the seeds' experiment 034, no protection).
PUBLISHED = {"en": 4544.20, "de": 11493.20, "fr": 3517.61, "zh": 152714.16, "ar": 372591.73, "he": 971648.26}


def test_default_texts_are_the_seeds_ten_languages() -> None:
    assert list(DEFAULT_TEXTS) == ["en", "de", "fr", "es", "he", "ar", "zh", "ja", "ko", "ru"]
    assert DEFAULT_TEXTS["en"] == "The quick brown fox jumps over the lazy dog near the river bank."
    assert len(SERIES_TEXTS["en"].encode()) == 44
    assert len(SERIES_TEXTS["he"].encode()) == 67


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("D1", (11493.20 + 3517.61 + 152714.16 + 372591.73 + 971648.26) / 5 / 4544.20),
        ("D2", ((152714.16 + 372591.73 + 971648.26) / 3) / ((4544.20 + 11493.20 + 3517.61) / 3)),
        ("D3", 213.8217),
        ("D4", 971648.26 - 3517.61),
        ("max", 213.8217),
    ],
)
def test_formulas_on_the_published_degradations(name: str, expected: float) -> None:
    assert disparity(name, PUBLISHED) == pytest.approx(expected, rel=1e-5)


def test_the_published_low_resource_disparity_is_reproduced() -> None:
    assert disparity("D6", PUBLISHED, groups=Groups(low_resource=("he", "ar"))) == pytest.approx(147.9072, rel=1e-5)


def test_quality_formula_compares_lost_quality() -> None:
    assert DISPARITY_FORMULAS["D5"].takes == "quality"
    groups = Groups(high_resource=("en",), low_resource=("he",))
    assert disparity("D5", {"en": 97.2, "he": 88.4}, groups=groups) == pytest.approx(11.6 / 2.8)


@pytest.mark.parametrize(
    ("fallback", "expected"), [("legacy-one", 20.0), ("legacy-infinity", math.inf), ("legacy-zero", 0.0)]
)
@pytest.mark.parametrize("english", [0.0, -3.0])
@pytest.mark.parametrize("name", ["D1", "D3", "D6", "max"])
def test_fallbacks_exist_only_by_name(name: str, english: float, fallback: Fallback, expected: float) -> None:
    values = {"en": english, "he": 20.0}
    assert disparity(name, values, fallback=fallback) == expected
    rigorous = disparity(name, values)
    assert isinstance(rigorous, Undefined)
    assert "not above 0" in rigorous.undefined


@pytest.mark.parametrize(("name", "values"), [("D2", {"en": -1.0, "he": 5.0}), ("D5", {"en": 100.0, "he": 90.0})])
def test_group_ratios_are_undefined_where_nothing_was_lost(name: str, values: dict[str, float]) -> None:
    assert isinstance(disparity(name, values), Undefined)
    assert disparity(name, values, fallback="legacy-infinity") == math.inf


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("D1", "languages to compare"),
        ("D2", "low-resource"),
        ("D3", "Hebrew"),
        ("D6", "languages to compare"),
        ("max", "other than the reference"),
    ],
)
def test_a_formula_without_its_languages_is_undefined(name: str, reason: str) -> None:
    found = disparity(name, {"en": 5.0})
    assert isinstance(found, Undefined)
    assert reason in found.undefined


def test_every_formula_is_printed_with_where_it_came_from() -> None:
    assert list(DISPARITY_FORMULAS) == ["D1", "D2", "D3", "D4", "D5", "D6", "max"]
    for formula in DISPARITY_FORMULAS.values():
        assert "deg" in formula.formula or "quality" in formula.formula
        assert formula.source


def test_unknown_formula_fallback_reference_and_infinite_values_are_errors() -> None:
    with pytest.raises(ConfigError, match="'D7' is not known; use one of D1, D2"):
        disparity("D7", PUBLISHED)
    with pytest.raises(ConfigError, match="'zero' is not known; use one of undefined, legacy-one"):
        disparity("D1", PUBLISHED, fallback="zero")  # type: ignore[arg-type]
    with pytest.raises(UnknownLanguageError, match="reference 'en' has no value; there are he"):
        disparity("D1", {"he": 3.0})
    with pytest.raises(ConfigError, match="values of ar are not finite"):
        disparity("D1", {"en": 1.0, "ar": math.inf})


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def family_folder(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(request.param)


def test_perplexity_is_the_exponential_of_the_mean_loss_without_bos(family_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(family_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(family_folder)
    for text in ("ab", DEFAULT_TEXTS["he"]):
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        losses = [-torch.log_softmax(logits[t - 1], -1)[ids[0, t]].item() for t in range(1, ids.shape[1])]
        assert perplexity(model, tokenizer, text) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    texts = {"en": DEFAULT_TEXTS["en"], "zh": DEFAULT_TEXTS["zh"]}
    assert perplexities(model, tokenizer, texts) == {lang: perplexity(model, tokenizer, t) for lang, t in texts.items()}


def test_perplexity_of_one_token_is_an_error(family_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(family_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(family_folder)
    with pytest.raises(ConfigError, match="'a' has fewer than 2 tokens"):
        perplexity(model, tokenizer, "a")
