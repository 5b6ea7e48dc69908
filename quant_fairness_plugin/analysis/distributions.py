"""How the values of one tensor are distributed: moments, outliers, and a histogram of magnitudes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_fairness_plugin.artifacts import Undefined
from quant_fairness_plugin.errors import ConfigError

Counts = NDArray[np.int64]
CHUNK = 1 << 22
"""Weights turned to float64 at a time: 32 MiB, whatever the size of the tensor."""
NEAR_ZERO = 0.01
"""The seeds' bound of a weight that counts as absent ("sparsity")."""
BIN_SHIFT = 13
"""Magnitudes are binned by the leading bits of their float32 form: 16-bit weights exactly, others to 0.1 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStatistics:
    """One tensor. Moments are those of its values, pooled; kurtosis is in excess of the normal distribution's."""

    name: str
    kind: str
    """`qkv`, `down`, `norms`, `embeddings`, …"""
    layer: int | None
    weights: int
    variance: float
    kurtosis: float | Undefined
    magnitude: float
    """Mean absolute value."""
    beyond_2_5_sigma: float
    beyond_3_sigma: float
    beyond_6_sigma: float
    near_zero: float
    """Share of values below 0.01 in magnitude."""
    max_over_sigma: float | Undefined


def describe(name: str, kind: str, layer: int | None, values: Tensor) -> TensorStatistics:
    """Return the statistics of one tensor, exact (two passes in float64).

    Raises:
        ConfigError: values that are not finite.
    """
    pieces = torch.split(values.reshape(-1), CHUNK)
    count = values.numel()
    mean = sum(float(piece.double().sum()) for piece in pieces) / count
    second = fourth = magnitude = zeros = peak = 0.0
    for piece in (piece.double() for piece in pieces):
        squares = (piece - mean).square()
        second, fourth = second + float(squares.sum()) / count, fourth + float(squares.square().sum()) / count
        magnitude, zeros = magnitude + float(piece.abs().sum()) / count, zeros + int((piece.abs() < NEAR_ZERO).sum())
        peak = max(peak, float(piece.abs().max()))
    if not second < float("inf"):
        raise ConfigError(f"{name}: its variance is {second}; expected finite weights. Get the model again")
    sigma = second**0.5
    beyond = [
        sum(int(((piece.double() - mean).abs() > times * sigma).sum()) for piece in pieces) / count
        for times in (2.5, 3.0, 6.0)
    ]
    flat = Undefined("all values are equal")
    return TensorStatistics(
        name=name,
        kind=kind,
        layer=layer,
        weights=count,
        variance=second,
        kurtosis=fourth / second**2 - 3.0 if second else flat,
        magnitude=magnitude,
        beyond_2_5_sigma=beyond[0],
        beyond_3_sigma=beyond[1],
        beyond_6_sigma=beyond[2],
        near_zero=zeros / count,
        max_over_sigma=peak / sigma if second else flat,
    )


def magnitude_histogram(values: Tensor) -> np.ndarray:
    """Return how many values lie in each bin of magnitude, ascending: `[2^18]`."""
    counts = np.zeros(1 << (31 - BIN_SHIFT), dtype=np.int64)
    for piece in torch.split(values.reshape(-1), CHUNK):
        bins = piece.float().abs().view(torch.int32) >> BIN_SHIFT
        counts += torch.bincount(bins, minlength=len(counts)).numpy()
    return counts
