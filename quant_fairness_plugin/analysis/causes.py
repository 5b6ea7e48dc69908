"""What follows from the damage of interventions: ratios of languages, the rate of bits, the share of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quant_fairness_plugin.artifacts import Interval, Number, StateScores, Undefined
from quant_fairness_plugin.measure.intervals import interval, ratio_interval, weighted_sums
from quant_fairness_plugin.measure.metrics import Array, kl_bits_per_byte
from quant_fairness_plugin.seeds.clipping import LEGACY_RATE_SLOPE, RATE_SLOPE
from quant_fairness_plugin.seeds.disparity import Groups

SLOPE_BITS = (4, 5, 6, 8)
"""Below, quantization is no small error any more, and the rate is another one."""
Series = Mapping[str, Array]
"""Language → KL in bits per byte, `[1 + draws]`, the estimate first."""


@dataclass(frozen=True, slots=True)
class RateSlope:
    """How fast the damage of one language falls with the bits."""

    language: str
    slope: Number
    """Of ln KL per bit from 4 to 8 bits: KL is a squared error while it is small."""
    expected: float
    """-2 ln 2: half the step, a quarter of the squared error."""
    seeds: float
    """-ln 2 / 2, the research scripts' figure."""


@dataclass(frozen=True, slots=True)
class LayerShare:
    """What one layer's quantization does, all layers behind it quantized too: activation patching."""

    language: str
    layer: int
    removed: Interval
    """KL with the layers before it in 16 bit, minus KL with it in 16 bit as well, in bits per byte."""
    share: Number
    """That over the KL of everything quantized; the layers' shares add up to 1."""


@dataclass(frozen=True, slots=True)
class HeadLayer:
    """What leaving out one attention head of a layer does on average."""

    layer: int
    heads: int
    mean_kl: Number
    """Bits per byte, over heads and languages."""
    low_over_high: Number
    """Low-resource languages over high-resource ones: the seeds' "sensitivity" of a layer."""


def kl_series(state: StateScores, languages: Sequence[str], weights: Array) -> dict[str, Array]:
    """Return KL in bits per byte of every language under every weighting of the sentences `[rows, sentences]`."""
    series = {}
    for language in languages:
        row = state.languages[language]
        sums = weighted_sums(weights, np.array([row.kl_nats, row.bytes_], dtype=np.float64).T.copy())
        series[language] = kl_bits_per_byte(sums[:, 0], sums[:, 1])
    return series


def low_over_high(series: Series) -> Number:
    """Return the mean KL of low-resource languages over that of high-resource ones, in the seeds' grouping."""
    groups = Groups()
    low = [series[name] for name in groups.low_resource if name in series]
    high = [series[name] for name in groups.high_resource if name in series]
    if not low or not high:
        return Undefined(f"none of {', '.join(groups.high_resource if low else groups.low_resource)} is supported")
    return ratio_interval(np.mean(low, axis=0), np.mean(high, axis=0), what="the KL of high-resource languages")


def rate_slopes(by_bits: Mapping[int, Series]) -> tuple[RateSlope, ...]:
    """Return every language's slope of ln KL over the bits, by least squares under every resample."""
    bits = np.array([width for width in SLOPE_BITS if width in by_bits], dtype=np.float64)
    centred = bits - bits.mean()
    rows = []
    for language in by_bits[int(bits[0])]:
        values = np.array([by_bits[int(width)][language] for width in bits])
        slope: Number = Undefined("the KL is 0 at some width")
        if np.all(values > 0):
            slope = interval(np.asarray(centred @ np.log(values) / (centred**2).sum()))
        rows.append(RateSlope(language, slope, RATE_SLOPE, LEGACY_RATE_SLOPE))
    return tuple(rows)


def head_layers(plans: Mapping[str, Series]) -> tuple[HeadLayer, ...]:
    """Return the mean over the heads of every layer.

    Args:
        plans: name, which ends in `LAYER.HEAD` → what leaving that head out does.
    """
    by_layer: dict[int, list[Series]] = {}
    for name, series in plans.items():
        by_layer.setdefault(int(name.rpartition(" ")[2].partition(".")[0]), []).append(series)
    rows = []
    for layer, members in sorted(by_layer.items()):
        mean = {language: np.mean([series[language] for series in members], axis=0) for language in members[0]}
        kl: Number = Undefined("the 16-bit model supports no language")
        if mean:
            kl = interval(np.mean(list(mean.values()), axis=0))
        rows.append(HeadLayer(layer, len(members), kl, low_over_high(mean)))
    return tuple(rows)


def layer_shares(prefixes: Sequence[Series]) -> tuple[LayerShare, ...]:
    """Return the share of every layer in every language.

    Args:
        prefixes: with no layer in 16 bit, with the first, with the first two, …; all of them in 16 bit is left out.
    """
    rows = []
    for language, whole in prefixes[0].items():
        steps = [series[language] for series in prefixes] + [np.zeros_like(whole)]
        for layer, (before, after) in enumerate(zip(steps, steps[1:], strict=False)):
            share = ratio_interval(before - after, whole, what=f"the KL of {language}")
            rows.append(LayerShare(language, layer, interval(before - after), share))
    return tuple(rows)
