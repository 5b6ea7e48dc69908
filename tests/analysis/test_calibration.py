from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from quant_fairness_plugin.analysis.calibration import (
    CalibrationComparison,
    Calibrations,
    compare_calibrations,
    to_json,
)
from quant_fairness_plugin.analysis.matrix import SPREAD
from quant_fairness_plugin.analysis.outcomes import CalibrationOutcome
from quant_fairness_plugin.artifacts import Bootstrap, Grid, Interval, ProtectionPlan, TextSet, Undefined
from quant_fairness_plugin.errors import ConfigError, UnknownLanguageError
from quant_fairness_plugin.measure.intervals import Resamples
from quant_fairness_plugin.measure.metrics import Array
from quant_fairness_plugin.measure.scoring import fixed_state, score_states
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.plans.costs import count_bytes
from quant_fairness_plugin.quantize.calibration import build_calibration
from quant_fairness_plugin.quantize.in_blocks import quantized_state
from quant_fairness_plugin.recommend import explicit_plan
from tests.planning import quantize_layers
from tests.planted_model import PLANTED_LAYER, planted_texts

GRID = Grid(bits=3, group_size=32)
DRAWS = 150
BOOTSTRAP = Bootstrap(None, DRAWS)


@pytest.fixture(scope="module")
def loaded(planted_model: Path) -> LoadedModel:
    return load_model(str(planted_model))


def plan_of(loaded: LoadedModel, *layers: int) -> ProtectionPlan:
    layer_bytes, other_bytes = count_bytes(loaded, GRID)
    return explicit_plan(layers, model="planted", grid=GRID, layer_bytes=layer_bytes, other_bytes=other_bytes)


@pytest.fixture(scope="module")
def comparison(loaded: LoadedModel) -> CalibrationComparison:
    plan = plan_of(loaded, PLANTED_LAYER)
    return compare_calibrations(loaded, planted_texts(), plan, Calibrations(matrix=True), bootstrap=BOOTSTRAP)


def kl_series(
    loaded: LoadedModel, texts: TextSet, language: str, calibrated_on: str, protected: tuple[int, ...]
) -> Array:
    """KL in bits per byte under every resample, sentence by sentence, the estimate first; written out naively."""
    calibration = build_calibration(loaded.tokenizer, texts, languages=["en"] if calibrated_on == "english" else None)
    quantized = quantize_layers(loaded, protected, method="gptq", grid=GRID, calibration=calibration)
    part = texts.part("confirm")
    scores = score_states([fixed_state("a", loaded.model), quantized_state("b", quantized)], loaded.tokenizer, part)
    found = scores["b"].languages[language]
    series = []
    for counts in Resamples(len(part), DRAWS, 0).weights:
        nats = sum(c * kl for c, kl in zip(counts, found.kl_nats, strict=True))
        series.append(nats / np.log(2) / sum(c * b for c, b in zip(counts, found.bytes_, strict=True)))
    return np.array(series)


def test_all_combinations_are_there_and_protection_is_what_the_plan_says(comparison: CalibrationComparison) -> None:
    found = [(outcome.calibration, outcome.protected) for outcome in comparison.outcomes]
    assert found == [(name, kept) for kept in (False, True) for name in ("english", "uniform", "minimax")]
    saved = comparison.tables[0].effects[0].protection_calibrated
    assert isinstance(saved, Interval)
    assert saved.low > 0  # 0.80 bits per byte: the damage is planted in the protected layer


def test_the_effects_are_differences_under_common_resamples(
    comparison: CalibrationComparison, loaded: LoadedModel
) -> None:
    texts = planted_texts()
    a, b, c, d = (
        kl_series(loaded, texts, "he", name, kept) for kept in ((), (PLANTED_LAYER,)) for name in ("english", "uniform")
    )
    table = comparison.tables[0]
    assert (table.first, table.other) == ("english", "uniform")
    effects = next(row for row in table.effects if row.subject == "he")
    expected = {
        "calibration": a - b,
        "calibration_protected": c - d,
        "protection": a - c,
        "protection_calibrated": b - d,
        "both": a - d,
        "interaction": b + c - a - d,
        "relative_interaction": (a / d) / ((a / b) * (a / c)),
    }
    for name, series in expected.items():
        number = getattr(effects, name)
        low, high = np.quantile(series[1:], [0.025, 0.975])
        wanted = (series[0], min(low, series[0]), max(high, series[0]))
        # 7 significant digits of figures of about 0.1, which differences keep absolutely
        assert (number.estimate, number.low, number.high) == pytest.approx(wanted, rel=1e-5, abs=1e-7), name


def test_worst_is_the_larger_of_the_languages_in_each_combination(comparison: CalibrationComparison) -> None:
    kl = {
        (o.calibration, o.protected): max(row.kl_bits_per_byte.estimate for row in o.languages)
        for o in comparison.outcomes
    }
    worst = comparison.tables[0].effects[0]
    assert worst.subject == "worst"
    assert isinstance(worst.both, Interval)
    assert worst.both.estimate == pytest.approx(kl["english", False] - kl["uniform", True], rel=1e-5)


def test_the_matrix_has_a_row_for_each_language_alone_with_equal_tokens(comparison: CalibrationComparison) -> None:
    matrix = comparison.matrix
    assert matrix is not None
    assert [row.calibration for row in matrix.rows] == ["en", "he", SPREAD, "english", "uniform", "minimax"]
    tokens = {row.calibration: sum(row.summary["tokens_per_language"].values()) for row in matrix.rows}
    assert tokens["en"] == tokens["he"]
    assert tokens["en"] - 1 <= tokens[SPREAD] <= tokens["en"]
    assert not any(row.protected for row in matrix.rows)
    estimates = {
        (row.calibration, d.language): d.kl_bits_per_byte.estimate for row in matrix.rows for d in row.languages
    }
    own = {row.language: row for row in matrix.own}
    for language, other in (("en", "he"), ("he", "en")):
        change = own[language].from_others
        assert isinstance(change, Interval)
        # Three figures below 10 with 7 significant digits: each is up to 5e-7 off.
        assert change.estimate == pytest.approx(estimates[other, language] - estimates[language, language], abs=1.5e-6)
    changes = [row.from_others for row in matrix.own if isinstance(row.from_others, Interval)]
    assert changes[1].low > 0  # 0.14 bits per byte: the planted channels are silent in English text
    better = sum(change.low > 0 for change in changes)
    assert matrix.verdict.startswith(
        "of 2 languages, calibrating on the language itself lowers its KL against another single language "
        f"in {better} (and raises it in 0)"
    )


def test_the_document_is_plain_json_and_the_same_twice(comparison: CalibrationComparison, loaded: LoadedModel) -> None:
    document = json.loads(to_json(comparison))
    assert next(iter(document)) == "schema_version"
    assert document["outcomes"][0]["summary"]["weights"] == {"en": 1.0}
    assert [row["weighting"] for row in (o["summary"] for o in document["outcomes"])][:3] == [
        "english",
        "uniform",
        "minimax",
    ]
    assert set(document["outcomes"][2]["summary"]["nearest_kl"]) == {"en", "he"}
    again = compare_calibrations(
        loaded,
        planted_texts(),
        plan_of(loaded, PLANTED_LAYER),
        Calibrations(weightings=["english", "uniform"]),
        bootstrap=BOOTSTRAP,
    )
    assert again.outcomes[0] == comparison.outcomes[0]
    assert again.tables[0] == comparison.tables[0]
    assert again.matrix is None


def test_without_protection_the_effects_of_protection_are_undefined(loaded: LoadedModel) -> None:
    calls: list[tuple[str, int, int]] = []
    found = compare_calibrations(
        loaded,
        planted_texts(),
        plan_of(loaded),
        Calibrations(weightings=["proportional", "uniform"]),
        bootstrap=BOOTSTRAP,
        progress=lambda *given: calls.append(given),
    )
    assert [outcome.protected for outcome in found.outcomes] == [False, False]
    worst = found.tables[0].effects[0]
    assert isinstance(worst.calibration, Interval)
    assert worst.interaction == worst.protection == Undefined("nothing is protected")
    assert "protection" not in found.tables[0].verdict.replace("without protection", "")
    assert [done for _, done, _ in calls] == [1, 2]
    assert all(later[1] > earlier[1] for earlier, later in pairwise(calls))


def test_languages_that_the_model_does_not_know_have_no_effects(loaded: LoadedModel) -> None:
    texts = planted_texts()
    noise = tuple("".join(chr(0x900 + (7 * i + 13 * k) % 110) for k in range(12)) for i in range(len(texts)))
    found = compare_calibrations(
        loaded,
        replace(texts, sentences=texts.sentences | {"hi": noise}),
        plan_of(loaded),
        Calibrations(weightings=["english", "uniform"]),
        bootstrap=BOOTSTRAP,
    )
    by_subject = {effects.subject: effects for effects in found.tables[0].effects}
    assert isinstance(by_subject["hi"].calibration, Undefined)
    assert "not supported or not intact" in by_subject["hi"].calibration.undefined
    assert isinstance(by_subject["worst"].calibration, Interval)
    outcome: CalibrationOutcome = found.outcomes[0]
    assert {row.language: row.status for row in outcome.languages}["hi"] == "unsupported"


def test_what_cannot_be_compared_is_an_error(loaded: LoadedModel) -> None:
    texts, plan = planted_texts(), plan_of(loaded)
    with pytest.raises(ConfigError, match="method 'rtn' uses no calibration text"):
        compare_calibrations(loaded, texts, plan, method="rtn", bootstrap=BOOTSTRAP)
    with pytest.raises(ConfigError, match="uniform, uniform: name at least one, each once"):
        compare_calibrations(loaded, texts, plan, Calibrations(weightings=["uniform", "uniform"]), bootstrap=BOOTSTRAP)
    with pytest.raises(ConfigError, match=r"\(none\): name at least one"):
        compare_calibrations(loaded, texts, plan, Calibrations(weightings=[]), bootstrap=BOOTSTRAP)
    with pytest.raises(UnknownLanguageError, match="needs English, which is not among he"):
        compare_calibrations(loaded, texts.choose(["he"]), plan, bootstrap=BOOTSTRAP)
