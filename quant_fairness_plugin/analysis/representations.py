"""What quantization does to hidden states, layer by layer and language by language, and where their energy lies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quant_fairness_plugin.analysis.collect import Activations, collect
from quant_fairness_plugin.analysis.quantized import quantized_state
from quant_fairness_plugin.analysis.request import Request
from quant_fairness_plugin.artifacts import Bootstrap, Interval, Number, Part, Undefined
from quant_fairness_plugin.evidence.weight_statistics import layer_statistics
from quant_fairness_plugin.measure.intervals import Resamples, interval, intervals, ratio_interval, weighted_sums
from quant_fairness_plugin.measure.metrics import Array, significant
from quant_fairness_plugin.model.linear import linear_weight

PART: Part = "search"
OUTLIER_LAYER = 3.0
"""A layer is an outlier where it adds more than so many times what the median layer adds, all languages alike."""
OUTLIER_CHANNEL = 36.0
"""A channel is an outlier where its mean square exceeds the median channel's so many times: six deviations."""


@dataclass(frozen=True, slots=True)
class SentenceSums:
    """The sums of every sentence: tokens, and by layer the sums over them."""

    tokens: tuple[int, ...]
    cosine_distance: tuple[tuple[float, ...], ...]
    squared_error: tuple[tuple[float, ...], ...]
    squared_norm: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class LanguageRepresentations:
    """One language, over all layers."""

    language: str
    cosine_distance: Interval
    """1 - cosine of quantized and 16-bit hidden states, the mean over tokens and layers."""
    to_reference: Number
    """That over the reference language's, sentences paired."""
    last_relative_error: Interval
    """Of the last layer's output: root of the squared error over the squared norm."""
    outlier_layers: float
    """Share of what all layers add that the outlier layers add."""
    effective_kurtosis: float
    """Excess kurtosis of the layers' weights, weighted by what each layer adds in this language."""
    by_sentence: SentenceSums


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRepresentations:
    """One layer in one language."""

    language: str
    layer: int
    cosine_distance: Interval
    relative_error: Interval
    added_share: float
    """Of what all layers add, by mean |output - input|."""
    outlier_channels: float
    """Share of the energy of the output that lies in the layer's outlier channels."""
    input_mean: float
    input_variance: float
    input_skewness: float
    input_kurtosis: float
    """Excess, of all values of the layer's input together."""


@dataclass(frozen=True, slots=True)
class Representations:
    """The answer of `analyze representations`."""

    state: str
    outlier_layers: tuple[int, ...]
    outlier_channels: tuple[int, ...]
    """How many, by layer."""
    languages: tuple[LanguageRepresentations, ...]
    layers: tuple[LayerRepresentations, ...]


def analyse(request: Request) -> Representations:
    """Run both models once on the search part.

    Raises:
        ConfigError: a checkpoint of another model, or a grid that fits no module.
    """
    loaded = request.load()
    grid = request.config.fitted(loaded).grid
    state = quantized_state(loaded, grid, request.options.checkpoint)
    activations = collect(loaded, state, request.texts.part(PART), progress=request.progress)
    kurtosis = [
        layer_statistics(linear_weight(module) for module in loaded.linears(layer).values()).kurtosis
        for layer in range(loaded.layers)
    ]
    return summarise(state.name, activations, np.array(kurtosis), request.config.bootstrap)


def summarise(
    state: str, activations: dict[str, Activations], kurtosis: Array, bootstrap: Bootstrap
) -> Representations:
    """Return the figures of all languages from their sums.

    Args:
        state: the name of the quantized model.
        activations: the sums.
        kurtosis: of the weights of every layer.
        bootstrap: resamples of the sentences, and the reference language.
    """
    added = {name: rows.added.sum(axis=1) / rows.added.sum() for name, rows in activations.items()}
    typical = np.mean(list(added.values()), axis=0)
    outliers = np.flatnonzero(typical > OUTLIER_LAYER * np.median(typical))
    channels = _outlier_channels(activations)
    series = {name: _distances(rows, bootstrap) for name, rows in activations.items()}
    reference = bootstrap.reference
    layers: list[LayerRepresentations] = []
    languages = []
    for name, rows in activations.items():
        errors = _errors(rows, bootstrap)
        languages.append(
            LanguageRepresentations(
                language=name,
                cosine_distance=interval(series[name].mean(axis=1)),
                to_reference=Undefined("no reference language was given")
                if reference is None
                else ratio_interval(
                    series[name].mean(axis=1), series[reference].mean(axis=1), what=f"the distance of {reference}"
                ),
                last_relative_error=interval(errors[:, -1]),
                outlier_layers=significant(float(added[name][outliers].sum())),
                effective_kurtosis=significant(float(added[name] @ kurtosis)),
                by_sentence=_by_sentence(rows),
            )
        )
        layers += _layers(name, rows, (series[name], errors), added[name], channels)
    return Representations(
        state,
        tuple(outliers.tolist()),
        tuple(int(count) for count in channels.sum(axis=1)),
        tuple(languages),
        tuple(layers),
    )


def input_moments(rows: Activations, layer: int) -> tuple[float, float, float, float]:
    """Return mean, variance, skewness and excess kurtosis of the values of a layer's input."""
    first, second, third, fourth = (rows.powers[layer] / rows.values).tolist()
    variance = second - first**2
    centred = third - 3 * first * second + 2 * first**3
    tails = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return first, variance, centred / variance**1.5, tails / variance**2 - 3


def _layers(
    language: str, rows: Activations, series: tuple[Array, Array], added: Array, channels: Array
) -> list[LayerRepresentations]:
    distance, error = intervals(series[0]), intervals(series[1])
    result = []
    for layer, energy in enumerate(rows.channels):
        mean, variance, skewness, kurtosis = (significant(value) for value in input_moments(rows, layer))
        result.append(
            LayerRepresentations(
                language=language,
                layer=layer,
                cosine_distance=distance[layer],
                relative_error=error[layer],
                added_share=significant(float(added[layer])),
                outlier_channels=significant(float(energy[channels[layer] > 0].sum() / energy.sum())),
                input_mean=mean,
                input_variance=variance,
                input_skewness=skewness,
                input_kurtosis=kurtosis,
            )
        )
    return result


def _outlier_channels(activations: dict[str, Activations]) -> Array:
    """1.0 where a channel is an outlier, `[layers, width]`; every language counts alike."""
    typical = np.mean([rows.channels / rows.tokens.sum() for rows in activations.values()], axis=0)
    limits: Array = OUTLIER_CHANNEL * np.median(typical, axis=1, keepdims=True)
    return np.where(typical > limits, 1.0, 0.0)


def _resampled(rows: Activations, columns: Array, bootstrap: Bootstrap) -> Array:
    """Sums over sentences of `[columns, sentences]` under every resample, `[1 + draws, columns]`."""
    return weighted_sums(Resamples.of(bootstrap, len(rows.tokens)).weights, np.ascontiguousarray(columns.T))


def _distances(rows: Activations, bootstrap: Bootstrap) -> Array:
    sums = _resampled(rows, np.vstack([rows.tokens[None], rows.cosine_distance]), bootstrap)
    means: Array = sums[:, 1:] / sums[:, :1]
    return means


def _errors(rows: Activations, bootstrap: Bootstrap) -> Array:
    sums = _resampled(rows, np.vstack([rows.squared_error, rows.squared_norm]), bootstrap)
    error, norm = np.split(sums, 2, axis=1)
    relative: Array = np.sqrt(error / norm)
    return relative


def _by_sentence(rows: Activations) -> SentenceSums:
    def table(values: Array) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(significant(value) for value in line) for line in values.tolist())

    return SentenceSums(
        tuple(round(count) for count in rows.tokens.tolist()),
        table(rows.cosine_distance),
        table(rows.squared_error),
        table(rows.squared_norm),
    )
