"""How a model's weights are distributed, tensor by tensor; no model is loaded.

Takes the model's files; returns statistics of every tensor, shares by tensor kind, and the seeds' criticality score,
compared with a sweep where one is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quant_fairness_plugin.analysis.distributions import Counts, TensorStatistics, describe, magnitude_histogram
from quant_fairness_plugin.analysis.predictors import LayerScore, compare_scores
from quant_fairness_plugin.analysis.request import Request
from quant_fairness_plugin.artifacts import SweepReport, Undefined, Unit, load
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.evidence.weight_statistics import LayerStatistics, criticality
from quant_fairness_plugin.measure.metrics import significant
from quant_fairness_plugin.model.families import detect_family
from quant_fairness_plugin.model.load import empty_model
from quant_fairness_plugin.model.reading import Place, read_tensor
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.model.skeleton import match_tensors
from quant_fairness_plugin.model.stacked_files import single_tensors
from quant_fairness_plugin.plans.units import HEAD, name_units

LARGEST_SHARE = 0.01
"""Of all weights, by magnitude, whose owners are counted."""
PRE_NORM = ("bloom", "gemma", "gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3")
"""Families in whose blocks, as Transformers computes them, norms stand before attention and MLP."""


@dataclass(frozen=True, slots=True)
class KindShare:
    """One tensor kind, over all layers."""

    kind: str
    weights: int
    share: float
    """Of all weights; a tied head counts with the embeddings, once."""
    share_of_largest: float
    """Of the largest 1 % of all weights by magnitude, ties at the limit included."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's matrices, each by itself, averaged by the number of weights; norms and biases are left out."""

    layer: int
    variance: float
    kurtosis: float
    magnitude: float
    beyond_2_5_sigma: float
    criticality: float | Undefined
    """The seeds' score; its weights were set by hand, never fitted."""


@dataclass(frozen=True, slots=True)
class WeightStatistics:
    """The answer of `analyze weights`."""

    norms: str | Undefined
    """Where norms stand: `before` attention and MLP, or `after` them."""
    kinds: tuple[KindShare, ...]
    layers: tuple[LayerWeights, ...]
    scores: tuple[LayerScore, ...]
    """How statistics of the layers agree with the sweep; empty without one."""
    tensors: tuple[TensorStatistics, ...]


def analyse(request: Request) -> WeightStatistics:
    """Read every tensor once and return its statistics.

    Raises:
        ArtifactError: pickled weights, or a malformed file.
        UnsupportedModelError: an architecture that is not supported.
        ConfigError: several sweeps, or one of another model or not of layers.
    """
    given = request.options.sweep or ()
    if len(given) > 1:
        raise ConfigError(
            f"{len(given)} sweeps given; analyze weights compares with one. Name that of {request.files.name}"
        )
    swept = load(SweepReport, given[0]) if given else None
    tensors, histograms = [], dict[str, Counts]()
    for kind, layer, name, place in _tensors(request.files):
        values = read_tensor(place)
        tensors.append(describe(name, kind, layer, values))
        counts = magnitude_histogram(values)
        histograms[kind] = histograms[kind] + counts if kind in histograms else counts
    layers = [_layer(tensors, index) for index in range(request.files.layers)]
    score: tuple[float, ...] | Undefined = Undefined("one layer: the score compares layers")
    if len(layers) > 1:
        score = criticality(layers)
    statistics = {
        "variance": tuple(layer.variance for layer in layers),
        "kurtosis": tuple(layer.kurtosis for layer in layers),
        "outliers": tuple(layer.outlier_share for layer in layers),
    }
    compared = statistics if isinstance(score, Undefined) else {"criticality": score, **statistics}
    scores = () if swept is None else compare_scores(compared, swept, request.files)
    each: Sequence[float | Undefined] = [score] * len(layers) if isinstance(score, Undefined) else score
    return WeightStatistics(
        norms=norm_placement(request.files),
        kinds=kind_shares(histograms),
        layers=tuple(
            LayerWeights(number, row.variance, row.kurtosis, row.magnitude, row.outlier_share, value)
            for number, (row, value) in enumerate(zip(layers, each, strict=True))
        ),
        scores=scores,
        tensors=tuple(tensors),
    )


def kind_shares(histograms: Mapping[str, Counts]) -> tuple[KindShare, ...]:
    """Return each kind's share of all weights and of the largest, the largest kind first."""
    total = np.sum(list(histograms.values()), axis=0)
    from_top = np.cumsum(total[::-1])
    limit = len(total) - 1 - int(np.searchsorted(from_top, LARGEST_SHARE * from_top[-1]))
    large = {kind: int(counts[limit:].sum()) for kind, counts in histograms.items()}
    rows = [
        KindShare(
            kind,
            int(counts.sum()),
            significant(float(counts.sum() / from_top[-1])),
            significant(large[kind] / sum(large.values())),
        )
        for kind, counts in histograms.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.weights))


def norm_placement(files: ModelFiles) -> str | Undefined:
    """Return `before` or `after` for a model whose config or family says where its norms stand."""
    if "do_layer_norm_before" in files.config:
        return "before" if files.config["do_layer_norm_before"] else "after"
    kind = str(files.config.get("model_type", ""))
    return "before" if kind in PRE_NORM else Undefined(f"not known for the type {kind!r}")


def _tensors(files: ModelFiles) -> Iterator[tuple[str, int | None, str, Place]]:
    """Yield kind, layer, name and place of every parameter, in forward order; a tied head is not one."""
    model = empty_model(files, trust_remote_code=files.runs_code)
    places = match_tensors(model, detect_family(model), files, single_tensors(files))
    family = detect_family(model)  # a head of its own is known by now
    units = name_units(family, files.layers, [name for name, _ in model.named_parameters() if family.owns(name)])
    for unit, names in ((unit, units.parameters[unit]) for stage in units.stages for unit in stage):
        if unit == HEAD and family.tied_head:
            continue
        named = Unit.parse(unit) if Unit.is_name(unit) else None
        for name in names:
            yield (
                (unit, None, name, places[name])
                if named is None
                else (str(named.group), named.layer, name, places[name])
            )


def _layer(tensors: list[TensorStatistics], layer: int) -> LayerStatistics:
    """Return the statistics of a layer's matrices, averaged by the number of weights."""
    rows = [row for row in tensors if row.layer == layer and row.kind not in ("norms", "biases")]
    share = np.array([row.weights for row in rows]) / sum(row.weights for row in rows)
    columns = [
        [row.variance for row in rows],
        [0.0 if isinstance(row.kurtosis, Undefined) else row.kurtosis for row in rows],
        [row.magnitude for row in rows],
        [row.beyond_2_5_sigma for row in rows],
    ]
    return LayerStatistics(*(float(share @ np.array(column)) for column in columns))
