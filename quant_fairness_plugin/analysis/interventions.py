"""What changes of the weights do to every language: bits, pruning, heads, whole layers, and 16 bit up to a layer.

Every change is a plan of a state tree, so that states which begin alike share their beginning, and every figure has an
interval over the same resampled sentences. "Layers 0 to l in 16 bit" is activation patching at l: what follows reads
the hidden states of the 16-bit model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quant_fairness_plugin.analysis.causes import (
    HeadLayer,
    LayerShare,
    RateSlope,
    Series,
    head_layers,
    kl_series,
    layer_shares,
    low_over_high,
    rate_slopes,
)
from quant_fairness_plugin.analysis.changes import CHANGES, prefix_name, silenced
from quant_fairness_plugin.analysis.collect import hooked
from quant_fairness_plugin.analysis.request import Request
from quant_fairness_plugin.analysis.variants import silent
from quant_fairness_plugin.artifacts import Interval, LanguageDamage, Number, Part, StateScores, TextSet, Undefined
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.measure.damage import measure_damage, supported_languages
from quant_fairness_plugin.measure.intervals import Resamples, interval
from quant_fairness_plugin.model.exchange import exchanged
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.plans.units import UnitMap, map_units
from quant_fairness_plugin.sweep.walk import score_plans

PART: Part = "search"
DEFAULT = ("bits",)


@dataclass(frozen=True, slots=True)
class PlanEffect:
    """One change, all supported languages together."""

    kind: str
    plan: str
    worst_kl: Number
    mean_kl: Number
    low_over_high: Number
    """Mean KL of low-resource languages (zh, ar, he) over that of high-resource ones (en, de, fr)."""


@dataclass(frozen=True, slots=True)
class LanguageEffect:
    """One change in one language."""

    kind: str
    plan: str
    language: str
    kl: Interval
    """Bits per byte."""
    delta_bpb: Interval
    status: str


@dataclass(frozen=True, slots=True)
class Interventions:
    """The answer of `analyze interventions`."""

    plans: tuple[PlanEffect, ...]
    languages: tuple[LanguageEffect, ...]
    rate: tuple[RateSlope, ...]
    """Of `bits`; empty without it."""
    layers: tuple[LayerShare, ...]
    """Of `prefix`; empty without it."""
    head_layers: tuple[HeadLayer, ...]
    """Of `heads`; empty without it."""
    scores: dict[str, StateScores]
    """Plan → per-sentence scores, on the search part."""


def analyse(request: Request) -> Interventions:
    """Make every change of the wanted kinds, one after another, and score each on the search part.

    Raises:
        ConfigError: an unknown kind, or a grid that fits no module.
        UnsupportedModelError: a kind that the architecture does not allow.
    """
    kinds = request.options.kinds or DEFAULT
    if unknown := [kind for kind in kinds if kind not in CHANGES]:
        raise ConfigError(f"--kind {unknown[0]!r} is unknown; use some of {', '.join(CHANGES)}, with commas between")
    loaded, texts = request.load(), request.texts.part(PART)
    units, grid = map_units(loaded), request.config.fitted(loaded).grid
    if "drop" in kinds:
        check_silence(loaded, units)
    changes = [(kind, change) for kind in kinds for change in CHANGES[kind](loaded, units, grid)]
    scores: dict[str, StateScores] = {}
    names: dict[str, str] = {}
    for done, (kind, change) in enumerate(changes):
        scores |= score_plans(loaded, change.plans, texts, units=units, bank=change.bank)
        names |= dict.fromkeys(change.plans, kind)
        if request.progress is not None:
            request.progress(done + 1, len(changes))
    return judge(names, scores, texts, request, vocabulary=int(loaded.model.config.get_text_config().vocab_size))


def judge(
    kinds: dict[str, str], scores: dict[str, StateScores], texts: TextSet, request: Request, *, vocabulary: int
) -> Interventions:
    """Return the figures of all plans from their scores.

    Args:
        kinds: plan → its kind.
        scores: of the 16-bit state and of every plan.
        texts: the sentences that were scored.
        request: resamples and reference.
        vocabulary: entries of the model's vocabulary.
    """
    bootstrap, baseline = request.config.bootstrap, scores[BASELINE]
    weights = Resamples.of(bootstrap, len(texts)).weights
    plans, languages = [], []
    series: dict[str, Series] = {}
    for plan, kind in kinds.items():
        damage = measure_damage(baseline, scores[plan], texts, vocabulary=vocabulary, bootstrap=bootstrap)
        known = [row.language for row in damage if row.status != "unsupported"]
        series[plan] = kl_series(scores[plan], known, weights)
        plans.append(_plan(kind, plan, series[plan], damage))
        languages += [
            LanguageEffect(kind, plan, row.language, row.kl_bits_per_byte, row.delta_bpb, row.status) for row in damage
        ]
    by_bits = {int(plan.removeprefix("int")): series[plan] for plan, kind in kinds.items() if kind == "bits"}
    prefixes = [series[prefix_name(layer)] for layer in range(sum(kind == "prefix" for kind in kinds.values()))]
    return Interventions(
        tuple(plans),
        tuple(languages),
        rate_slopes(by_bits) if by_bits else (),
        layer_shares(prefixes) if prefixes else (),
        head_layers({plan: series[plan] for plan, kind in kinds.items() if kind == "heads"}),
        scores,
    )


def check_silence(loaded: LoadedModel, units: UnitMap) -> None:
    """Refuse a model whose layers do not pass their input on where what they add is zero, on some tokens.

    Raises:
        UnsupportedModelError: the block changes it all the same (norms behind it, say).
    """
    make = silent(loaded, units)
    layer = loaded.layers - 1
    values = {name: value for unit in silenced(loaded, units, layer) for name, value in make(unit).items()}
    equal: list[bool] = []

    def note(number: int, entered: torch.Tensor, left: torch.Tensor) -> None:
        if number == layer:
            equal.append(torch.equal(entered, left))

    blocks = loaded.model.get_submodule(loaded.family.blocks)
    with torch.no_grad(), exchanged(loaded.model, values), hooked(blocks, note):
        loaded.model.base_model(input_ids=torch.arange(1, 9)[None].to(loaded.model.device), use_cache=False)
    if not all(equal):
        raise UnsupportedModelError(
            f"{loaded.files.name}: a layer that adds nothing still changes its input, so it cannot be left out by its "
            "weights; expected blocks that add to what they are given. Use the other kinds"
        )


def _plan(kind: str, plan: str, series: Series, damage: Sequence[LanguageDamage]) -> PlanEffect:
    lost = [row.language for row in damage if row.status == "collapsed"]
    supported = supported_languages(damage)
    nothing = Undefined(f"collapsed in {', '.join(lost)}" if lost else "the 16-bit model supports no language")
    if lost or not supported:
        return PlanEffect(kind, plan, nothing, nothing, nothing)
    values = np.array([series[name] for name in supported])
    return PlanEffect(kind, plan, interval(values.max(axis=0)), interval(values.mean(axis=0)), low_over_high(series))
