"""Where to clip: the range that a uniform quantizer of 2^bits levels should cover, for a distribution of known shape.

What `rules` applies to weights; imports no torch. The question is that of Banner
et al., "Post training 4-bit quantization" (ACIQ, arXiv 1810.05723). Their answer rests on two approximations: rounding
noise of Δ²/12 on the whole axis, and overload counted from the threshold. Here the squared error itself is minimised:
cell by cell, its integral has a closed form in the distribution's partial moments. (At 4 bits and up the two agree to a
few percent; at 2 bits they do not.)

A threshold alpha stands for a step of 2 alpha / (2^bits - 1). The levels are those of the two kinds of grid:
*symmetric* grids hold the integers -2^(bits-1) … 2^(bits-1) - 1 and so reach one step further below 0 than above; the
levels of asymmetric ones run from -alpha to alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import ndtr, stdtr

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.quantize.grid_rules import check_bits

Shape = Literal["gaussian", "laplace", "student-t"]
Array = npt.NDArray[np.float64]

SMALLEST_ALPHA, LARGEST_ALPHA = 0.1, 300.0
"""Thresholds that are tried. For the heaviest tails that a kurtosis can stand for (4 degrees of freedom) the optimum
lies between 1.7 sigma (2 bits) and 17.7 sigma (8 bits); towards 2 degrees it goes on growing, to 101 sigma."""
COARSE_STEPS = 60
DOF_POINTS = 33
"""Degrees of freedom at which `alpha_by_tail` is worked out; straight lines between them."""


@dataclass(frozen=True, slots=True)
class ClippingError:
    """The mean squared error of a quantizer, in squared units of the distribution's scale."""

    granular: float
    """From values within half a step of the levels: rounding."""
    overload: float
    """From values beyond: clipping."""

    @property
    def total(self) -> float:
        """The mean squared error."""
        return self.granular + self.overload


def quantization_error(
    alpha: float, bits: int, shape: Shape, *, symmetric: bool = True, dof: float | None = None
) -> ClippingError:
    """The mean squared error of a uniform quantizer, exact up to the rounding of float64.

    Args:
        alpha: half of the span of the levels, in units of sigma (Gaussian, Student-t) or b (Laplace).
        bits: the quantizer has 2^bits levels.
        shape: the distribution, with mean 0.
        symmetric: which levels, see the module's text.
        dof: degrees of freedom of the Student-t distribution, above 2; None for the others.

    Raises:
        ConfigError: bits, a shape or degrees of freedom that cannot be used.
    """
    _check(bits, shape, dof)
    count = 2**bits
    step = 2 * alpha / (count - 1)
    levels = step * (np.arange(count) - (count / 2 if symmetric else (count - 1) / 2))
    inner = np.concatenate([levels - step / 2, levels[-1:] + step / 2])
    edges = np.concatenate([[-np.inf], inner, [np.inf]])
    nearest = np.concatenate([levels[:1], levels, levels[-1:]])
    mass, first, second = (np.diff(moment) for moment in _partial_moments(edges, shape, dof))
    cells = second - 2 * nearest * first + nearest**2 * mass
    return ClippingError(granular=float(cells[1:-1].sum()), overload=float(cells[0] + cells[-1]))


@lru_cache(maxsize=1024)
def optimal_alpha(bits: int, shape: Shape, *, symmetric: bool = True, dof: float | None = None) -> float:
    """The threshold at which the mean squared error is least, in units of sigma (Gaussian, Student-t) or b (Laplace).

    Args:
        bits: the quantizer has 2^bits levels.
        shape: the distribution, with mean 0.
        symmetric: which levels, see the module's text.
        dof: degrees of freedom of the Student-t distribution, above 2; None for the others.

    Raises:
        ConfigError: bits, a shape or degrees of freedom that cannot be used.
    """

    def error(log_alpha: float) -> float:
        return quantization_error(math.exp(log_alpha), bits, shape, symmetric=symmetric, dof=dof).total

    tries = np.linspace(math.log(SMALLEST_ALPHA), math.log(LARGEST_ALPHA), COARSE_STEPS)
    best = int(np.argmin([error(point) for point in tries]))
    bounds = (tries[max(best - 1, 0)], tries[min(best + 1, COARSE_STEPS - 1)])
    return math.exp(minimize_scalar(error, bounds=bounds, method="bounded", options={"xatol": 1e-7}).x)


def dof_of_kurtosis(excess: float) -> float:
    """The degrees of freedom of the Student-t distribution with this excess kurtosis: 4 + 6 / excess.

    Infinite (a Gaussian) where the excess is not positive: no Student-t distribution has lighter tails.

    Raises:
        ConfigError: the kurtosis is undefined (NaN or infinite).
    """
    if not math.isfinite(excess):
        raise ConfigError(f"kurtosis {excess!r} is undefined; give that of at least four values that are not all equal")
    return 4 + 6 / excess if excess > 0 else math.inf


@lru_cache(maxsize=64)
def alpha_by_tail(bits: int, *, symmetric: bool = True) -> Array:
    """Student-t thresholds in sigma at `DOF_POINTS` even steps of 1 / dof from 0 (a Gaussian) to 1/4, float64.

    That is all that a kurtosis can ask for: 1 / dof = excess / (4 excess + 6), below 1/4 for any finite excess.

    Raises:
        ConfigError: bits that cannot be used.
    """
    tails = np.linspace(0.0, 0.25, DOF_POINTS)
    heavy = [optimal_alpha(bits, "student-t", symmetric=symmetric, dof=1 / tail) for tail in tails[1:]]
    return np.array([optimal_alpha(bits, "gaussian", symmetric=symmetric), *heavy])


def _check(bits: int, shape: Shape, dof: float | None) -> None:
    check_bits(bits)
    if shape not in {"gaussian", "laplace", "student-t"}:
        raise ConfigError(f"distribution {shape!r} is unknown; use 'gaussian', 'laplace' or 'student-t'")
    if (shape == "student-t") != (dof is not None):
        raise ConfigError(f"{dof} degrees of freedom do not go with {shape}; 'student-t' needs them, the others do not")
    if dof is not None and not dof > 2:
        raise ConfigError(f"{dof} degrees of freedom have no finite variance; use a number above 2")


Moments = tuple[Array, Array, Array, float]
"""∫ f, ∫ t f and ∫ t² f from -∞ up to each point, and the variance."""


def _partial_moments(points: Array, shape: Shape, dof: float | None) -> tuple[Array, Array, Array]:
    """∫ f, ∫ t f and ∫ t² f from -∞ up to each point, for the density f of unit scale (unit sigma, or unit b)."""
    bounded = np.isfinite(points)
    inside = np.where(bounded, points, 0.0)  # the formulas would multiply an infinite point by a density of 0
    if shape == "gaussian":
        mass, first, second, variance = _gaussian(inside)
    elif shape == "laplace":
        mass, first, second, variance = _laplace(inside)
    else:
        assert dof is not None
        mass, first, second, variance = _student(inside, dof)
    ends = np.isposinf(points).astype(float)
    return np.where(bounded, mass, ends), np.where(bounded, first, 0.0), np.where(bounded, second, ends * variance)


def _gaussian(x: Array) -> Moments:
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    mass = ndtr(x)
    return mass, -density, mass - x * density, 1.0


def _laplace(x: Array) -> Moments:
    tail, size = np.exp(-np.abs(x)) / 2, np.abs(x)
    below = tail * (size**2 + 2 * size + 2)
    return np.where(x < 0, tail, 1 - tail), -(size + 1) * tail, np.where(x < 0, below, 2 - below), 2.0


def _student(x: Array, dof: float) -> Moments:
    unit = math.sqrt((dof - 2) / dof)  # of a raw Student-t variable, where the result has variance 1
    raw = x / unit
    log_density = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - math.log(dof * math.pi) / 2
    density = np.exp(log_density - (dof + 1) / 2 * np.log1p(raw**2 / dof))
    mass = stdtr(dof, raw)
    slope = (dof + raw**2) * density  # integrating t f by parts, twice
    return mass, -unit * slope / (dof - 1), unit**2 * (dof * mass - raw * slope) / (dof - 2), 1.0
