from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch
from scipy import stats

from quant_fairness_plugin.artifacts import Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.evidence import weight_statistics
from quant_fairness_plugin.evidence.layer_scores import sensitivity_scores
from quant_fairness_plugin.evidence.weight_statistics import LayerStatistics, criticality, layer_statistics


def matrix(rows: int, columns: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    drawn = np.random.default_rng(seed).standard_t(5, size=(rows, columns)) * spread + 0.3
    return torch.tensor(drawn, dtype=torch.float32)


@pytest.mark.parametrize("chunk", [7, 1 << 22])
def test_statistics_are_those_of_each_matrix_weighted_by_its_size(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_statistics, "CHUNK", chunk)
    weights = [matrix(17, 5, 0), matrix(3, 63, 1, spread=9.0)]
    expected, total = np.zeros(4), 0
    for weight in weights:
        flat = weight.double().numpy().ravel()
        outliers = np.abs(flat - flat.mean()) > 2.5 * flat.std()
        own = (flat.var(), stats.kurtosis(flat), np.abs(flat).mean(), outliers.mean())
        expected += flat.size * np.array(own)
        total += flat.size
    assert astuple(layer_statistics(weights)) == pytest.approx(tuple(expected / total), rel=1e-9)


def test_half_precision_weights_are_summed_in_float64() -> None:
    weight = torch.full((300, 300), 100.0, dtype=torch.float16)
    weight[::2] = 101.0
    found = layer_statistics([weight])
    assert found.variance == pytest.approx(0.25)
    assert found.magnitude == pytest.approx(100.5)


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ConfigError, match="give matrices only"):
        layer_statistics([torch.ones(4)])
    with pytest.raises(ConfigError, match="no weight matrix"):
        layer_statistics([])
    with pytest.raises(ConfigError, match="no finite spread"):
        layer_statistics([torch.tensor([[1.0, float("nan")]])])


def layer(variance: float, kurtosis: float, outliers: float) -> LayerStatistics:
    return LayerStatistics(variance=variance, kurtosis=kurtosis, magnitude=0.0, outlier_share=outliers)


def test_criticality_is_the_formula_of_the_seeds() -> None:
    rows = [layer(0.01 * (i + 1), 1.0 + i % 3, 0.02 + 0.001 * i) for i in range(12)]
    found = criticality(rows)
    assert not isinstance(found, Undefined)
    variance, kurtosis, outliers = (
        [getattr(row, name) for row in rows] for name in ("variance", "kurtosis", "outlier_share")
    )
    for i in range(12):
        depth = i / 11
        expected = (
            2.5 * (1 if i in (0, 11) else 0)
            + 1.5 * variance[i] / np.mean(variance)
            + 0.8 * kurtosis[i] / np.mean(kurtosis)
            + 1.2 * outliers[i] / np.mean(outliers)
            + 1.0 * (1 if 0.7 <= depth <= 0.8 else 0)
            - 0.5 * min(i, 11 - i) / 6
        )
        assert found[i] == pytest.approx(expected)


def test_equal_layers_differ_by_their_place_alone() -> None:
    found = criticality([layer(1.0, 1.0, 1.0)] * 12)
    assert not isinstance(found, Undefined)
    assert sorted(range(12), key=lambda i: -found[i])[:3] == [0, 11, 8]
    assert found[8] - found[4] == pytest.approx(1.0 + 0.5 / 6)


def test_criticality_has_no_value_where_it_would_divide_by_nothing() -> None:
    assert criticality([layer(1.0, -0.5, 0.1)] * 4) == Undefined(
        "the mean excess kurtosis of the layers is -0.5: the score divides by it"
    )
    assert isinstance(criticality([layer(1.0, 1.0, 0.0)] * 4), Undefined)
    with pytest.raises(ConfigError, match="give at least 2"):
        criticality([layer(1.0, 1.0, 1.0)])


def test_a_unit_scores_as_its_worst_language() -> None:
    assert sensitivity_scores({"a": {"en": 0.1, "he": 0.3}, "b": {"he": 0.2, "en": 0.25}}) == {"a": 0.3, "b": 0.25}
    with pytest.raises(ConfigError, match="different languages"):
        sensitivity_scores({"a": {"en": 0.1}, "b": {"he": 0.2}})
    with pytest.raises(ConfigError, match="or in none"):
        sensitivity_scores({"a": {}})


def test_a_constant_matrix_has_no_spread_and_no_tails() -> None:
    found = layer_statistics([torch.ones(2, 2)])
    assert (found.variance, found.kurtosis, found.magnitude, found.outlier_share) == (0.0, 0.0, 1.0, 0.0)
