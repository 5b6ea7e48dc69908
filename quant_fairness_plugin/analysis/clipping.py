"""Would one clipping threshold for all languages hurt some of them? Of the inputs of every layer, as they are.

The seeds' language-aware threshold (LA-ACIQ) on measured moments, by their formula and by the right one, beside the
best threshold of each language.
"""

from __future__ import annotations

from dataclasses import dataclass

from quant_fairness_plugin.analysis.collect import Activations, collect, spread
from quant_fairness_plugin.analysis.representations import PART, input_moments
from quant_fairness_plugin.analysis.request import Request
from quant_fairness_plugin.measure.metrics import Array, significant
from quant_fairness_plugin.measure.scoring import fixed_state
from quant_fairness_plugin.seeds.clipping import (
    ClipComparison,
    Component,
    Regime,
    compare_languages,
    integer_grid_error,
    kurtosis_regime,
    laaciq_alpha,
)

VALUES = 2048
"""Of a layer's input in each language, evenly spread over the text: the thresholds are searched on them."""


@dataclass(frozen=True, slots=True)
class LanguageClipping:
    """One layer in one language. Errors are shares of the language's variance."""

    layer: int
    language: str
    kurtosis: float
    """Excess, of all values."""
    regime: Regime
    best_alpha: float
    best_error: float
    global_error: float
    """With the mean of the languages' best thresholds."""
    minimax_error: float
    """With the threshold at which the worst language loses least."""


@dataclass(frozen=True, slots=True)
class LayerClipping:
    """One layer, all languages with equal weight."""

    layer: int
    worst_best: float
    """The largest of the languages' errors, each with a threshold of its own."""
    worst_global: float
    worst_minimax: float
    worst_laaciq: float
    """With the threshold for the mixture's spread and kurtosis."""
    worst_legacy: float
    """With the seeds' formula for the same."""
    laaciq_alpha: float
    legacy_alpha: float
    minimax_alpha: float


@dataclass(frozen=True, slots=True)
class Clipping:
    """The answer of `analyze clipping`: symmetric, one threshold for a whole layer's input."""

    bits: int
    layers: tuple[LayerClipping, ...]
    languages: tuple[LanguageClipping, ...]


def analyse(request: Request) -> Clipping:
    """Collect the inputs of every layer on the search part and search their thresholds.

    Raises:
        ConfigError: bits that cannot be used, or a language whose inputs have no spread.
    """
    loaded, texts, bits = request.load(), request.texts.part(PART), request.config.bits
    activations = collect(loaded, fixed_state("16 bit", loaded.model), texts, sample=VALUES, progress=request.progress)
    layers, languages = [], []
    for layer in range(loaded.layers):
        samples = {name: _some(rows, layer) for name, rows in activations.items()}
        compared = compare_languages(samples, bits)
        layers.append(_layer(layer, activations, samples, compared, bits))
        languages += [
            LanguageClipping(
                layer=layer,
                language=name,
                kurtosis=significant(input_moments(activations[name], layer)[3]),
                regime=kurtosis_regime(input_moments(activations[name], layer)[3]),
                best_alpha=significant(row.best_alpha),
                best_error=significant(row.best_error),
                global_error=significant(row.global_error),
                minimax_error=significant(row.minimax_error),
            )
            for name, row in compared.languages.items()
        ]
    return Clipping(bits, tuple(layers), tuple(languages))


def _some(rows: Activations, layer: int) -> Array:
    return spread(rows.sample(layer), VALUES, rows.channels.shape[1])


def _layer(
    layer: int, activations: dict[str, Activations], samples: dict[str, Array], compared: ClipComparison, bits: int
) -> LayerClipping:
    parts = []
    for rows in activations.values():
        mean, variance, skewness, excess = input_moments(rows, layer)
        parts.append(Component(1 / len(activations), mean, variance, excess, skewness))
    right, legacy = laaciq_alpha(parts, bits), laaciq_alpha(parts, bits, legacy=True)

    def worst(alpha: float) -> float:
        errors = (integer_grid_error(values, alpha, bits) / values.var() for values in samples.values())
        return significant(float(max(errors)))

    return LayerClipping(
        layer=layer,
        worst_best=significant(max(row.best_error for row in compared.languages.values())),
        worst_global=significant(compared.worst_global),
        worst_minimax=significant(compared.worst_minimax),
        worst_laaciq=worst(right),
        worst_legacy=worst(legacy),
        laaciq_alpha=significant(right),
        legacy_alpha=significant(legacy),
        minimax_alpha=significant(compared.minimax_alpha),
    )
