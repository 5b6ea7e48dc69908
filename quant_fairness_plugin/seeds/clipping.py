"""Clipping thresholds: the seeds' formulas as they were, what is wrong with each, what is right; languages compared.

Takes moments or samples; returns thresholds, errors and tables. The functions named `legacy_*` reproduce the numbers of
the research notes that this project grew out of ("the seeds"), errors included, and nothing else here uses them. The
right thresholds are those of `quantize.clipping`; Banner et al. (ACIQ, arXiv 1810.05723) is where both began.

Terms: sigma = standard deviation, b = a Laplace distribution's mean distance from its centre, kurtosis = excess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import lambertw, ndtr
from scipy.stats import kurtosis as sample_kurtosis
from scipy.stats import norm

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.quantize.clipping.theory import alpha_by_tail, dof_of_kurtosis, optimal_alpha
from quant_fairness_plugin.quantize.grid_rules import check_bits

Array = npt.NDArray[np.float64]
Regime = Literal["low", "middle", "high"]

LOW_KURTOSIS, HIGH_KURTOSIS = 1.0, 1.5
"""The seeds' bounds of their two regimes. They were read off weight statistics that had been typed in by hand, one set
per language, so the bounds are theirs to be reproduced and nothing that was measured."""
LEGACY_RATE_SLOPE = -math.log(2) / 2
"""The seeds' slope of log error per bit, -0.347. Wrong by a factor of four for a squared error (`RATE_SLOPE`); they
confirmed it on data that had been made with it."""
RATE_SLOPE = -2 * math.log(2)
"""A bit more halves the step and quarters the squared error: -1.386 per bit of its logarithm."""


# The seeds


def legacy_gaussian_clip_error(z: float) -> float:
    """`2 (z sf(z) + pdf(z))`, in sigma², given as ACIQ's equation 7.

    Wrong: the overload of a Gaussian is `gaussian_clip_error`. This one rises at first, from 0.80 to 1.01 at half a
    sigma (the true one falls from 1), and at 2.5 sigma it is 28 times too large.
    """
    return float(2 * (z * norm.sf(z) + norm.pdf(z)))


def legacy_optimal_alpha(bits: int = 4) -> float:
    """The threshold in sigma at which `legacy_gaussian_clip_error` + (2 alpha / (2^bits - 1))² / 12 is least.

    Wrong through its first term: 3.54 sigma at 4 bits, the seeds' "about 3.5", where the optimum is 2.54.
    """
    return _minimise(lambda z: legacy_gaussian_clip_error(z) + (2 * z / (2**bits - 1)) ** 2 / 12, 0.5, 6.0)


def legacy_adjusted_alpha(excess: float, bits: int = 4) -> float:
    """`legacy_optimal_alpha` × (1 + 0.1 max(0, kurtosis)), in sigma: the seeds' 4.3 for heavy tails.

    Wrong through its base; and the growth has no source. `kurtosis_adjusted_alpha` is what a kurtosis calls for.
    """
    return legacy_optimal_alpha(bits) * (1 + 0.1 * max(0.0, excess))


def legacy_log_alpha(
    sigma: float, excess: float, bits: int = 4, *, variant: Literal["library", "corpus", "intervention"] = "library"
) -> float:
    """`sigma (C + D ln(1 + max(0, kurtosis)))`, ascribed to Banner et al., who have no such formula.

    C = 2.0 at 3 bits, 2.5 at 4, and at 8 bits 4.0 (`corpus`: 1.5, less than at 3 bits). D = 0.3 (`intervention`:
    0.25 at 3 bits, 0.5 at 8). At any other width the 4-bit numbers are used (`corpus`: 1.5).

    Wrong: it grows too slowly with the tails. At 4 bits a Laplace distribution (kurtosis 3) gets 2.92 sigma and has
    its optimum at 3.51, a Student-t with 5 degrees of freedom (kurtosis 6) 3.08 and 3.68.
    """
    corpus, intervention = variant == "corpus", variant == "intervention"
    base = {3: 2.0, 4: 2.5}.get(bits, 1.5) if corpus else {3: 2.0, 4: 2.5, 8: 4.0}.get(bits, 2.5)
    growth = {3: 0.25, 4: 0.3, 8: 0.5}.get(bits, 0.3) if intervention else 0.3
    return sigma * (base + growth * math.log(1 + max(0.0, excess)))


def legacy_step_alpha(sigma: float, kurtosis: float) -> float:
    """`2.5 sigma` below kurtosis 4, `3.0 sigma` below 8, then `(3.5 + 0.1 (kurtosis - 8)) sigma`; for 4 bits.

    Wrong: steps where the optimum is smooth, and no bound on how far it grows, while the optimum at 4 bits never passes
    4.18 sigma. The kurtosis is not said to be excess or not.
    """
    factor = 2.5 if kurtosis < 4 else 3.0 if kurtosis < 8 else 3.5 + 0.1 * (kurtosis - 8)
    return factor * sigma


def legacy_constant_alpha(sigma: float) -> float:
    """`2.83 sigma`, said to be ACIQ's for Gaussian weights at 4 bits.

    Wrong twice: 2.83 is ACIQ's for a Laplace distribution at 2 bits, and in units of b.
    """
    return 2.83 * sigma


def legacy_quantize(values: Array, alpha: float, bits: int) -> Array:
    """`round(clip(x) / D) D` with `D = 2 alpha / (2^bits - 1)`.

    Wrong: rounding to whole multiples gives 2^bits + 1 levels (17 at 4 bits), the outermost at up to 1.067 alpha.
    """
    step = 2 * alpha / (2**bits - 1)
    rounded: Array = np.round(np.clip(values, -alpha, alpha) / step) * step
    return rounded


def legacy_error(values: Array, alpha: float, bits: int) -> float:
    """`E[(|x| - alpha)²; |x| > alpha] + D²/12 P(|x| <= alpha)` with `D = 2 alpha / (2^bits - 1)`, said to be the MSE.

    Wrong as an equality: `legacy_quantize` does not clip at alpha but at its outermost level, so that the first term
    is too large: 0.049 for Gaussian values at 1.5 sigma and 4 bits, where their quantizer has 0.039.
    """
    size = np.abs(values)
    overload = np.where(size > alpha, (size - alpha) ** 2, 0.0).mean()
    return float(overload + (2 * alpha / (2**bits - 1)) ** 2 / 12 * (size <= alpha).mean())


def legacy_disparity_bound(kurtoses: Sequence[float], bits: int, *, exponent: Literal[1, 2] = 2) -> float:
    """`sqrt(Var[kurtosis]) 2^(-bits / exponent)`, once with exponent 2 and once with 1, without its constant.

    No bound: nothing is derived, the constant is free, and languages of equal kurtosis may well differ in damage.
    """
    return float(np.std(kurtoses)) * math.pow(2.0, -bits / exponent)


def legacy_layer_bits(kurtosis: float, threshold: float) -> int:
    """8 bits for a layer whose kurtosis is above a threshold, else 4: the seeds' "LA-ACIQ v2".

    A rule without a budget, and about weights alone. A sweep measures which layers need more.
    """
    return 8 if kurtosis > threshold else 4


# What is right


def gaussian_clip_error(z: float) -> float:
    """The overload of a unit Gaussian clipped at ±z: 2 ((1 + z²) sf(z) - z pdf(z))."""
    return float(2 * ((1 + z * z) * ndtr(-z) - z * norm.pdf(z)))


def aciq_alpha(bits: int, shape: Literal["gaussian", "laplace"]) -> float:
    """The threshold of the ACIQ paper, in sigma or b: the least of overload beyond alpha + alpha² / (3 · 4^bits).

    Rounding noise is taken as that of 2^bits steps in ±alpha on the whole axis. For Laplace that is alpha e^alpha =
    3 · 4^bits. `optimal_alpha` drops the approximation.

    Raises:
        ConfigError: bits that cannot be used.
    """
    check_bits(bits)
    if shape == "laplace":
        return float(lambertw(3 * 4.0**bits).real)
    return _minimise(lambda z: gaussian_clip_error(z) + z * z / (3 * 4.0**bits), 0.1, 8.0)


def kurtosis_adjusted_alpha(sigma: float, excess: float, bits: int, *, symmetric: bool = True) -> float:
    """The best threshold for a Student-t distribution of this standard deviation and kurtosis.

    Raises:
        ConfigError: bits that cannot be used, or an undefined kurtosis.
    """
    check_bits(bits)
    dof = dof_of_kurtosis(excess)
    tails = np.linspace(0.0, 0.25, len(alpha_by_tail(bits, symmetric=symmetric)))
    return sigma * float(np.interp(1 / dof, tails, alpha_by_tail(bits, symmetric=symmetric)))


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a mixture, such as the weights as one language uses them."""

    weight: float
    """Its share; shares add up to 1."""
    mean: float
    variance: float
    excess: float
    skewness: float = 0.0
    """Left out by the seeds."""


def mixture_variance(parts: Sequence[Component]) -> float:
    """Σ w (sigma² + d²), with d the distance of a part's mean from the mixture's.

    Raises:
        ConfigError: no parts, or shares that do not add up to 1.
    """
    mean = _mixture_mean(parts)
    return sum(part.weight * (part.variance + (part.mean - mean) ** 2) for part in parts)


def effective_kurtosis(parts: Sequence[Component]) -> float:
    """The excess kurtosis of a mixture.

    [Σ w (k + 3) sigma⁴ + 4 Σ w g sigma³ d + 6 Σ w sigma² d² + Σ w d⁴] / variance² - 3. The seeds have it without the
    second term, which is right only where the skewness g of every part off the centre is 0.

    Raises:
        ConfigError: no parts, shares that do not add up to 1, or a mixture without spread.
    """
    mean, variance = _mixture_mean(parts), mixture_variance(parts)
    if not variance > 0:
        raise ConfigError("the mixture's variance is 0, so its kurtosis is undefined; give parts with spread")
    fourth = 0.0
    for part in parts:
        away, sigma = part.mean - mean, math.sqrt(part.variance)
        fourth += part.weight * (
            (part.excess + 3) * sigma**4 + 4 * part.skewness * sigma**3 * away + 6 * sigma**2 * away**2 + away**4
        )
    return fourth / variance**2 - 3


def laaciq_alpha(parts: Sequence[Component], bits: int, *, legacy: bool = False) -> float:
    """The language-aware threshold for weights that languages share: that of the mixture's spread and kurtosis.

    Args:
        parts: what each language sees.
        bits: the quantizer has 2^bits levels.
        legacy: the seeds' `legacy_log_alpha` instead of `kurtosis_adjusted_alpha`.

    Raises:
        ConfigError: parts or bits that cannot be used.
    """
    sigma, excess = math.sqrt(mixture_variance(parts)), effective_kurtosis(parts)
    return legacy_log_alpha(sigma, excess, bits) if legacy else kurtosis_adjusted_alpha(sigma, excess, bits)


def kurtosis_regime(excess: float) -> Regime:
    """The seeds' regime of a kurtosis: `low` below 1.0, `high` from 1.5 on, `middle` between."""
    return "low" if excess < LOW_KURTOSIS else "high" if excess >= HIGH_KURTOSIS else "middle"


# Languages compared


@dataclass(frozen=True, slots=True)
class LanguageClip:
    """What clipping thresholds mean for one language. Errors are shares of the language's variance."""

    sigma: float
    excess: float
    regime: Regime
    best_alpha: float
    """The best threshold for this language alone, searched on its values."""
    best_error: float
    """No static file can give this to more than one language."""
    global_error: float
    """With one threshold for all: the mean of the languages' best ones."""
    minimax_error: float
    """With the threshold at which the worst language's error is least."""


@dataclass(frozen=True, slots=True)
class ClipComparison:
    """One threshold for all languages, determined in two ways, against one for each."""

    languages: dict[str, LanguageClip]
    global_alpha: float
    minimax_alpha: float

    @property
    def worst_global(self) -> float:
        """The largest error with the global threshold."""
        return max(language.global_error for language in self.languages.values())

    @property
    def worst_minimax(self) -> float:
        """The largest error with the minimax threshold; never above `worst_global`."""
        return max(language.minimax_error for language in self.languages.values())


def compare_languages(samples: Mapping[str, Array], bits: int) -> ClipComparison:
    """Thresholds for values that differ by language, such as a layer's activations.

    Args:
        samples: language → values with mean near 0, at least four that are not all equal.
        bits: symmetric quantizer of 2^bits levels.

    Raises:
        ConfigError: no languages, bits that cannot be used, or a language without spread.
    """
    check_bits(bits)
    spreads = {language: float(np.std(values)) for language, values in samples.items()}
    if not spreads or not all(spread > 0 for spread in spreads.values()):
        flat = ", ".join(language for language, spread in spreads.items() if not spread > 0) or "no language"
        raise ConfigError(f"{flat}: values without spread have no threshold; give varied values of every language")
    best = {language: _best_on(values, bits) for language, values in samples.items()}
    shared = float(np.mean(list(best.values())))

    def relative(language: str, alpha: float) -> float:
        return integer_grid_error(samples[language], alpha, bits) / spreads[language] ** 2

    def worst(alpha: float) -> float:
        return max(relative(language, alpha) for language in samples)

    # The worst language's error may have several valleys; the languages' optima and the global one are tried too.
    inner = _minimise(worst, min(best.values()), max(best.values()))
    minimax = min([inner, shared, *best.values()], key=worst)
    languages = {}
    for language, values in samples.items():
        excess = float(sample_kurtosis(values, bias=False))
        languages[language] = LanguageClip(
            sigma=spreads[language],
            excess=excess,
            regime=kurtosis_regime(excess),
            best_alpha=best[language],
            best_error=relative(language, best[language]),
            global_error=relative(language, shared),
            minimax_error=relative(language, minimax),
        )
    return ClipComparison(languages, shared, minimax)


def integer_grid_error(values: Array, alpha: float, bits: int) -> float:
    """The mean squared error of values on the integers -2^(bits-1) … 2^(bits-1) - 1 times 2 alpha / (2^bits - 1)."""
    step = 2 * alpha / (2**bits - 1)
    levels = np.clip(np.round(values / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return float(((levels * step - values) ** 2).mean())


def _best_on(values: Array, bits: int) -> float:
    guess = optimal_alpha(bits, "gaussian") * float(np.std(values))
    return _minimise(lambda alpha: integer_grid_error(values, alpha, bits), guess / 3, 3 * guess)


def _minimise(function: Callable[[float], float], low: float, high: float, *, tries: int = 200) -> float:
    """The lowest point in an interval: of even tries, then refined between the neighbours of the best."""
    if high <= low:
        return low
    points = np.linspace(low, high, tries)
    best = int(np.argmin([function(float(point)) for point in points]))
    bounds = (points[max(best - 1, 0)], points[min(best + 1, tries - 1)])
    result = minimize_scalar(function, bounds=bounds, method="bounded", options={"xatol": 1e-8})
    return float(result.x) if result.fun <= function(float(points[best])) else float(points[best])


def _mixture_mean(parts: Sequence[Component]) -> float:
    total = sum(part.weight for part in parts)
    if not math.isclose(total, 1.0, rel_tol=1e-6):
        raise ConfigError(f"the shares of the {len(parts)} parts add up to {total:g}; they must add up to 1")
    return sum(part.weight * part.mean for part in parts)
