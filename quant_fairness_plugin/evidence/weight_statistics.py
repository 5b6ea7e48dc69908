"""Statistics of a layer's weights, and the seeds' criticality score that is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Undefined
from quant_fairness_plugin.errors import ConfigError

OUTLIER_DEVIATIONS = 2.5
"""A weight counts as an outlier beyond so many standard deviations of its matrix, as in the seeds' score."""
CHUNK = 1 << 22
"""Weights turned to float64 at a time: 32 MiB, whatever the size of the matrix."""
CONSOLIDATION = (0.7, 0.8)
"""Relative depths that the seeds' score favours."""


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Statistics of a layer's weight matrices, each matrix by itself, averaged by the number of weights."""

    variance: float
    kurtosis: float
    """Excess kurtosis: 0 for a normal distribution."""
    magnitude: float
    """Mean absolute weight."""
    outlier_share: float
    """Weights beyond 2.5 standard deviations of their matrix."""


def layer_statistics(weights: Iterable[Tensor]) -> LayerStatistics:
    """Return the statistics of one layer, exact (two passes in float64).

    Args:
        weights: the layer's weight matrices `[rows, cols]`, one at a time; norms and biases do not belong here.

    Raises:
        ConfigError: no matrix, a tensor that is none, or values that are not finite.
    """
    rows, counts = [], []
    for weight in weights:
        if weight.dim() != 2:
            raise ConfigError(f"a weight of shape {tuple(weight.shape)}: give matrices only, not norms or biases")
        rows.append(_moments(weight))
        counts.append(float(weight.numel()))
    if not rows:
        raise ConfigError("no weight matrix in the layer, so it has no statistics")
    values = torch.tensor(rows, dtype=torch.float64)
    share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    return LayerStatistics(*(share @ values).tolist())


def criticality(layers: Sequence[LayerStatistics]) -> tuple[float, ...] | Undefined:
    """Return the seeds' criticality score of every layer, on real statistics; high = protect first.

    Its weights were set by hand, never fitted: 2.5 · first or last layer + 1.5 · variance + 0.8 · excess kurtosis +
    1.2 · outlier share (each over its mean over the layers) + 1.0 · depth between 70 and 80 % - 0.5 · distance to the
    nearer end over half the depth.

    Returns:
        One score per layer; undefined where a mean is not above 0, so that nothing can be relative to it.

    Raises:
        ConfigError: fewer than two layers.
    """
    n = len(layers)
    if n < 2:
        raise ConfigError(f"{n} layer(s): the score compares layers, give at least 2")
    columns = {
        "variance": [layer.variance for layer in layers],
        "excess kurtosis": [layer.kurtosis for layer in layers],
        "outlier share": [layer.outlier_share for layer in layers],
    }
    means = {name: sum(values) / n for name, values in columns.items()}
    for name, mean in means.items():
        if mean <= 0:
            return Undefined(f"the mean {name} of the layers is {mean:.3g}: the score divides by it")
    relative = zip(*([value / means[name] for value in values] for name, values in columns.items()), strict=True)
    return tuple(
        1.5 * variance + 0.8 * kurtosis + 1.2 * outliers + _depth_score(layer, n)
        for layer, (variance, kurtosis, outliers) in enumerate(relative)
    )


def _depth_score(layer: int, layers: int) -> float:
    """The part of the score that comes from a layer's depth alone."""
    last = layers - 1
    low, high = CONSOLIDATION
    inside = low <= layer / last <= high
    return 2.5 * (layer in (0, last)) + 1.0 * inside - 0.5 * min(layer, last - layer) / (layers // 2)


def _moments(weight: Tensor) -> tuple[float, float, float, float]:
    """Variance, excess kurtosis, mean magnitude and outlier share of one matrix."""
    pieces = torch.split(weight.detach().reshape(-1), CHUNK)
    count = weight.numel()
    mean = sum(float(piece.double().sum()) for piece in pieces) / count
    magnitude = sum(float(piece.double().abs().sum()) for piece in pieces) / count
    second = fourth = 0.0
    for piece in pieces:
        squares = (piece.double() - mean).square()
        second += float(squares.sum()) / count
        fourth += float(squares.square().sum()) / count
    if not second < float("inf"):
        raise ConfigError(f"a weight of shape {tuple(weight.shape)} has variance {second}: it holds no finite spread")
    if second == 0.0:  # all weights are equal (a pruned matrix): no spread, so no tails either
        return 0.0, 0.0, magnitude, 0.0
    limit = OUTLIER_DEVIATIONS * second**0.5
    outliers = sum(int(((piece.double() - mean).abs() > limit).sum()) for piece in pieces)
    return second, fourth / second**2 - 3.0, magnitude, outliers / count
