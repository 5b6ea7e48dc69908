"""Planted effects: per-sentence scores whose damage per language and layer is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import comb

import numpy as np

from quant_fairness_plugin.artifacts import (
    Bootstrap,
    Combinations,
    Grid,
    LanguageDamage,
    LanguageScores,
    Mode,
    Precision,
    Provenance,
    StateScores,
    SweepReport,
    SweepRow,
    TextSet,
)
from quant_fairness_plugin.measure.damage import measure_damage, objective_values
from quant_fairness_plugin.plans.plan_set import BASELINE, NONE, plan_name

SENTENCES = 60
LANGUAGES = ("en", "he", "zh")
VOCABULARY = 4096
BOOTSTRAP = Bootstrap(draws=200)
ALPHABET = "abcdefghijklmnopqrstuvwxyz "


def planted_texts() -> TextSet:
    """Sentences on which a byte unigram model needs about 4.7 bits per byte: worse than the planted baseline."""
    draw = np.random.default_rng(0)
    sentences = {
        language: tuple("".join(draw.choice(list(ALPHABET), size=80)) for _ in range(SENTENCES))
        for language in LANGUAGES
    }
    return TextSet(
        name="planted",
        sentences=sentences,
        ids=tuple(f"s{i}" for i in range(SENTENCES)),
        parts=("search",) * SENTENCES,
        registers=("",) * SENTENCES,
        parallel=True,
        sha256="0" * 64,
    )


def state(name: str, harm: dict[str, float], *, noise: float = 0.1, seed: int = 1) -> StateScores:
    """Scores with a mean extra NLL and KL of `harm[language]` nats a sentence; sentences differ by `noise`."""
    draw = np.random.default_rng(seed)
    base = np.random.default_rng(99).uniform(100.0, 120.0, SENTENCES)
    rows = {}
    for language in LANGUAGES:
        extra = harm[language] * (1.0 + noise * draw.standard_normal(SENTENCES))
        rows[language] = LanguageScores(
            nll_nats=tuple((base + extra).tolist()),
            tokens=(30,) * SENTENCES,
            bytes_=(80,) * SENTENCES,
            kl_nats=tuple(np.abs(extra).tolist()),
            flips=(1 if harm[language] else 0,) * SENTENCES,
        )
    return StateScores(state=name, languages=rows)


def planted_report(benefit: list[float], *, noise: float = 0.1, groups: tuple[str, ...] = ()) -> SweepReport:
    """A protect-one sweep in which protecting unit i takes `benefit[i]` nats a sentence off every language's harm.

    The units are layers, of 1000 bytes or 260 quantized; with `groups` they are these parts of layers, in forward
    order, of 400 or 110 bytes each.
    """
    units = [f"layers.{i}" for i in range(len(benefit))]
    if groups:
        units = [f"layers.{i // len(groups)}.{groups[i % len(groups)]}" for i in range(len(benefit))]
    gains: dict[tuple[str, ...], dict[str, float]] = {
        (unit,): dict.fromkeys(LANGUAGES, gain) for unit, gain in zip(units, benefit, strict=True)
    }
    return _report(gains, {}, noise=noise, groups=groups)


def planted_sets(
    gains: Mapping[tuple[str, ...], float | Mapping[str, float]],
    *,
    others: Mapping[Precision, Mapping[str, float | Mapping[str, float]]] | None = None,
    noise: float = 0.1,
) -> SweepReport:
    """As `planted_report`, of layers, with sets of them and other precisions.

    Args:
        gains: set of units in 16 bit → nats a sentence that it takes off the harm of every language, or of each.
        others: precision → unit → the same for this unit in this precision.
        noise: by how much sentences differ.
    """
    alone = {(unit, kind): _by_language(gain) for kind, units in (others or {}).items() for unit, gain in units.items()}
    return _report({units: _by_language(gain) for units, gain in gains.items()}, alone, noise=noise)


def _by_language(gain: float | Mapping[str, float]) -> Mapping[str, float]:
    return dict.fromkeys(LANGUAGES, gain) if isinstance(gain, float) else gain


def _report(
    gains: Mapping[tuple[str, ...], Mapping[str, float]],
    alone: Mapping[tuple[str, Precision], Mapping[str, float]],
    *,
    noise: float,
    groups: tuple[str, ...] = (),
) -> SweepReport:
    swept: list[tuple[tuple[str, ...], Precision | None]] = [((), None), *((units, "fp16") for units in gains)]
    swept += [((unit,), kind) for unit, kind in alone]
    layers = 1 + max(int(unit.split(".")[1]) for units in gains for unit in units)
    texts, scores = planted_texts(), {BASELINE: state(BASELINE, dict.fromkeys(LANGUAGES, 0.0))}
    total, rows = {"en": 4.0, "he": 8.0, "zh": 6.0}, []
    for index, (units, kind) in enumerate(swept):
        gain = (
            dict.fromkeys(LANGUAGES, 0.0) if kind is None else gains[units] if kind == "fp16" else alone[units[0], kind]
        )
        plan = NONE if kind is None else plan_name("protect-one", units, kind)
        harm = {language: value - gain[language] for language, value in total.items()}
        scores[plan] = state(plan, harm, noise=noise, seed=index + 1)
        rows.append(_row(plan, units, kind, scores, texts))
    sizes = {"fp16": (1000,) * layers, "quantized": (260,) * layers, "int8": (510,) * layers, "int5": (320,) * layers}
    for group in groups:
        sizes |= {f"fp16.{group}": (400,) * layers, f"quantized.{group}": (110,) * layers}
    counts = Counter(map(len, gains))
    return SweepReport(
        provenance=Provenance(
            versions={}, model="planted", model_sha256="", text_set="planted", text_sha256="", arguments={}, seed=0
        ),
        layers=layers,
        granularity="unit" if groups else "layer",
        precisions=("fp16", *dict.fromkeys(kind for _, kind in alone)),
        combine=max(counts),
        combinations={size: Combinations(evaluated=n, possible=comb(counts[1], size)) for size, n in counts.items()},
        grid=Grid(),
        reference="en",
        languages={row.language: row.status for row in rows[0].damage},
        rows=tuple(rows),
        rankings={},
        scores=scores,
        layer_bytes=sizes,
        other_bytes=500,
    )


def _row(
    plan: str,
    units: tuple[str, ...],
    precision: Precision | None,
    scores: dict[str, StateScores],
    texts: TextSet,
) -> SweepRow:
    damage: tuple[LanguageDamage, ...] = measure_damage(
        scores[BASELINE], scores[plan], texts, vocabulary=VOCABULARY, bootstrap=BOOTSTRAP
    )
    objectives = objective_values(scores[BASELINE], scores[plan], damage, bootstrap=BOOTSTRAP)
    mode: Mode | None = "protect-one" if units else None
    return SweepRow(plan=plan, mode=mode, units=units, precision=precision, damage=damage, objectives=objectives)
