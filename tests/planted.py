"""Planted effects: per-sentence scores whose damage per language and layer is known."""

from __future__ import annotations

import numpy as np

from quant_fairness_plugin.artifacts import (
    Combinations,
    Grid,
    LanguageDamage,
    LanguageScores,
    Provenance,
    StateScores,
    SweepReport,
    SweepRow,
    TextSet,
)
from quant_fairness_plugin.measure.damage import measure_damage, objective_values
from quant_fairness_plugin.sweep.ranking import BASELINE, NONE, plan_name

SENTENCES = 60
LANGUAGES = ("en", "he", "zh")
VOCABULARY = 4096
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
    layers = len({unit.split(".")[1] for unit in units})
    texts, base = planted_texts(), dict.fromkeys(LANGUAGES, 0.0)
    total = {"en": 4.0, "he": 8.0, "zh": 6.0}
    scores = {BASELINE: state(BASELINE, base), NONE: state(NONE, total, noise=noise)}
    for index, gain in enumerate(benefit):
        harm = {language: value - gain for language, value in total.items()}
        plan = plan_name("protect-one", units[index : index + 1])
        scores[plan] = state(plan, harm, noise=noise, seed=index + 2)
    rows = tuple(_row(plan, scores, texts) for plan in scores if plan != BASELINE)
    sizes = {"fp16": (1000,) * layers, "quantized": (260,) * layers}
    for group in groups:
        sizes |= {f"fp16.{group}": (400,) * layers, f"quantized.{group}": (110,) * layers}
    return SweepReport(
        provenance=Provenance(
            versions={}, model="planted", model_sha256="", text_set="planted", text_sha256="", arguments={}, seed=0
        ),
        layers=layers,
        granularity="unit" if groups else "layer",
        combine=1,
        combinations={1: Combinations(evaluated=len(benefit), possible=len(benefit))},
        grid=Grid(),
        reference="en",
        languages={row.language: row.status for row in rows[0].damage},
        rows=rows,
        rankings={},
        scores=scores,
        layer_bytes=sizes,
        other_bytes=500,
    )


def _row(plan: str, scores: dict[str, StateScores], texts: TextSet) -> SweepRow:
    damage: tuple[LanguageDamage, ...] = measure_damage(
        scores[BASELINE], scores[plan], texts, reference="en", vocabulary=VOCABULARY, draws=200
    )
    objectives = objective_values(scores[BASELINE], scores[plan], damage, reference="en", draws=200)
    units = () if plan == NONE else (f"layers.{plan.split()[1]}",)
    mode = "protect-one" if units else None
    return SweepRow(plan=plan, mode=mode, units=units, damage=damage, objectives=objectives)
