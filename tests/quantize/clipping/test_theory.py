from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.quantize.clipping.theory import (
    DOF_POINTS,
    Shape,
    alpha_by_tail,
    dof_of_kurtosis,
    optimal_alpha,
    quantization_error,
)

SHAPES: list[tuple[Shape, float | None]] = [
    ("gaussian", None),
    ("laplace", None),
    ("student-t", 5.0),
    ("student-t", 4.2),
]
ALL_BITS = range(2, 9)


def frozen(shape: Shape, dof: float | None) -> Any:
    """The same distribution by scipy, of unit sigma or unit b."""
    if shape == "gaussian":
        return stats.norm()
    return stats.laplace() if dof is None else stats.t(dof, scale=math.sqrt((dof - 2) / dof))


def naive_quantize(x: np.ndarray[Any, Any], alpha: float, bits: int, *, symmetric: bool) -> np.ndarray[Any, Any]:
    """Rounding and clamping, as the grid does it: whole multiples of the step, or (asymmetric) halves."""
    step = 2 * alpha / (2**bits - 1)
    if symmetric:
        return np.clip(np.round(x / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    return np.clip(np.floor(x / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step + step / 2


def numeric_error(alpha: float, bits: int, shape: Shape, dof: float | None, *, symmetric: bool) -> float:
    """∫ (x - Q(x))² f(x) dx by quadrature, cell by cell out to where nothing is left."""
    law = frozen(shape, dof)
    step = 2 * alpha / (2**bits - 1)
    offset = 0.5 if symmetric else 0.0
    inner = [(k - offset) * step for k in range(-(2 ** (bits - 1)), 2 ** (bits - 1) + 1)]

    def loss(x: float) -> float:
        value = float(naive_quantize(np.array(x), alpha, bits, symmetric=symmetric))
        return (x - value) ** 2 * float(law.pdf(x))

    edges = [-np.inf, *inner, np.inf]
    return math.fsum(integrate.quad(loss, a, b)[0] for a, b in zip(edges[:-1], edges[1:], strict=True))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "dof"), SHAPES)
@pytest.mark.parametrize(("bits", "alpha"), [(2, 1.0), (3, 2.7), (4, 5.0)])
def test_the_error_is_the_integral_of_the_squared_error(
    shape: Shape, dof: float | None, bits: int, alpha: float, *, symmetric: bool
) -> None:
    found = quantization_error(alpha, bits, shape, symmetric=symmetric, dof=dof)
    assert found.total == pytest.approx(numeric_error(alpha, bits, shape, dof, symmetric=symmetric), rel=1e-6)
    assert found.granular > 0
    assert found.overload > 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "dof"), SHAPES)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_optimum_is_that_of_a_grid_search(shape: Shape, dof: float | None, bits: int, *, symmetric: bool) -> None:
    law = frozen(shape, dof)
    # 40,001 points, dense around 0 and out to 548, each with the probability of its surroundings.
    edges = np.sinh(np.linspace(-7, 7, 40_002))
    values, mass = (edges[1:] + edges[:-1]) / 2, np.diff(law.cdf(edges))

    def error(alpha: float) -> float:
        return float((mass * (values - naive_quantize(values, alpha, bits, symmetric=symmetric)) ** 2).sum())

    tries = np.geomspace(0.7, 30, 150)
    found = optimal_alpha(bits, shape, symmetric=symmetric, dof=dof)
    assert error(found) <= min(error(alpha) for alpha in tries) * 1.001  # as far apart as the points stand
    exact = partial(quantization_error, bits=bits, shape=shape, symmetric=symmetric, dof=dof)
    assert exact(found).total <= min(exact(alpha).total for alpha in tries) * (1 + 1e-9)


@pytest.mark.parametrize(("shape", "dof"), SHAPES[:3])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_error_is_what_samples_have(shape: Shape, dof: float | None, bits: int) -> None:
    values = frozen(shape, dof).rvs(400_000, random_state=bits)
    alpha = optimal_alpha(bits, shape, dof=dof)
    sampled = (values - naive_quantize(values, alpha, bits, symmetric=True)) ** 2
    spread = float(sampled.std() / math.sqrt(len(sampled)))
    assert abs(float(sampled.mean()) - quantization_error(alpha, bits, shape, dof=dof).total) < 4 * spread


@pytest.mark.parametrize(("bits", "step"), [(2, 0.9957), (3, 0.5860), (4, 0.3352), (5, 0.1881)])
def test_gaussian_steps_are_those_of_max(bits: int, step: float) -> None:
    # J. Max, "Quantizing for minimum distortion" (1960), Table II: the best even spacing for 4, 8, 16, 32 levels.
    alpha = optimal_alpha(bits, "gaussian", symmetric=False)
    assert 2 * alpha / (2**bits - 1) == pytest.approx(step, abs=5e-5)


@pytest.mark.parametrize(("shape", "dof"), SHAPES)
def test_more_bits_reach_further_and_err_less(shape: Shape, dof: float | None) -> None:
    alphas = [optimal_alpha(bits, shape, dof=dof) for bits in ALL_BITS]
    errors = [quantization_error(a, b, shape, dof=dof).total for a, b in zip(alphas, ALL_BITS, strict=True)]
    assert alphas == sorted(alphas)
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_heavier_tails_reach_further(bits: int) -> None:
    alphas = [optimal_alpha(bits, "student-t", dof=dof) for dof in (1000.0, 30.0, 10.0, 6.0, 4.5)]
    assert alphas == sorted(alphas)
    assert alphas[0] == pytest.approx(optimal_alpha(bits, "gaussian"), rel=0.005)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_table_of_tails_is_close_between_its_points(bits: int) -> None:
    for tail in (0.004, 0.1, 0.247):
        between = np.interp(tail, np.linspace(0, 0.25, DOF_POINTS), alpha_by_tail(bits))
        assert between == pytest.approx(optimal_alpha(bits, "student-t", dof=1 / tail), rel=1e-3)


@pytest.mark.parametrize(("excess", "dof"), [(6.0, 5.0), (1.0, 10.0), (0.0, math.inf), (-1.2, math.inf)])
def test_degrees_of_freedom_have_the_kurtosis_that_was_asked_for(excess: float, dof: float) -> None:
    assert dof_of_kurtosis(excess) == dof
    if math.isfinite(dof):
        assert float(stats.t(dof).stats("k")) == pytest.approx(excess)


@pytest.mark.parametrize("excess", [math.nan, math.inf])
def test_an_undefined_kurtosis_is_refused(excess: float) -> None:
    with pytest.raises(ConfigError, match="is undefined; give that of at least four values"):
        dof_of_kurtosis(excess)


@pytest.mark.parametrize(
    ("bits", "shape", "dof", "message"),
    [
        (1, "gaussian", None, "bits 1 is not an integer from 2 to 8"),
        (4, "cauchy", None, "distribution 'cauchy' is unknown"),
        (4, "student-t", None, "None degrees of freedom do not go with student-t"),
        (4, "laplace", 5.0, "5.0 degrees of freedom do not go with laplace"),
        (4, "student-t", 2.0, "2.0 degrees of freedom have no finite variance"),
    ],
)
def test_what_has_no_optimum_is_refused(bits: int, shape: Any, dof: float | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        optimal_alpha(bits, shape, dof=dof)
