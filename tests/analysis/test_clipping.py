"""Thresholds of languages whose inputs are as given: one for all costs the language that is unlike the others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from quant_fairness_plugin.analysis import clipping
from quant_fairness_plugin.analysis.clipping import Clipping
from quant_fairness_plugin.analysis.collect import Activations
from quant_fairness_plugin.analysis.kinds import find_analysis
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.seeds.clipping import integer_grid_error, kurtosis_regime
from tests.analysis.samples import request_of


def planted(values: np.ndarray) -> Activations:
    """One layer of width 1 whose inputs are these values."""
    rows = Activations.empty(1, 2, 1)
    rows.tokens[:] = len(values) / 2
    rows.powers[0] = [float((values**power).sum()) for power in (1, 2, 3, 4)]
    rows.samples[0].append(values)
    return rows


def test_a_language_of_another_scale_pays_for_one_threshold(
    load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(2)
    samples = {"en": draw.standard_normal(2000), "he": 4 * draw.standard_normal(2000)}
    monkeypatch.setattr(clipping, "collect", lambda *_, **__: {name: planted(v) for name, v in samples.items()})
    loaded = load("llama", layers=1)
    result = find_analysis("clipping").run(request_of(loaded))
    assert isinstance(result, Clipping)
    [layer] = result.layers
    assert layer.worst_best < 0.5 * layer.worst_minimax
    assert layer.worst_minimax <= layer.worst_global
    for alpha, worst in ((layer.laaciq_alpha, layer.worst_laaciq), (layer.legacy_alpha, layer.worst_legacy)):
        errors = [integer_grid_error(values, alpha, 4) / values.var() for values in samples.values()]
        assert worst == pytest.approx(max(errors), rel=1e-4)
    assert [row.regime for row in result.languages] == ["low", "low"]


def test_languages_that_are_alike_share_a_threshold(load: Callable[..., LoadedModel]) -> None:
    loaded = load("llama", layers=2)
    result = find_analysis("clipping").run(request_of(loaded))
    assert isinstance(result, Clipping)
    assert [(row.layer, row.language) for row in result.languages] == [(0, "en"), (0, "he"), (1, "en"), (1, "he")]
    for row in result.languages:
        # The error has many small valleys, and the search tries 200 points: it may miss the lowest by a little.
        assert row.best_error <= 1.001 * min(row.global_error, row.minimax_error)
        assert row.regime == kurtosis_regime(row.kurtosis)
