"""Quantized models scored on one part of a text set, all under the same resamples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quant_fairness_plugin.artifacts import Bootstrap, LanguageDamage, Number, StateScores, TextSet
from quant_fairness_plugin.measure.damage import measure_damage, objective_draws, summarise
from quant_fairness_plugin.measure.intervals import Resamples
from quant_fairness_plugin.measure.metrics import Array
from quant_fairness_plugin.measure.scoring import block_state, score_states
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.in_blocks import quantized_state
from quant_fairness_plugin.quantize.quantized import QuantizedModel

BASELINE, STATE = "16 bit", "quantized"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOutcome:
    """One way to calibrate, and what the quantized model lost in each language."""

    calibration: str
    """A weighting, or in a matrix also a language that alone was calibrated on."""
    protected: bool
    """Whether the plan was applied; otherwise everything was quantized."""
    summary: dict[str, Any]
    """`CalibrationSet.summary()`: coverage, weights, checksums."""
    languages: tuple[LanguageDamage, ...]
    worst_kl: Number
    mean_kl: Number


@dataclass(frozen=True, slots=True)
class Scored:
    """An outcome, with the per-sentence scores that it was made from."""

    outcome: CalibrationOutcome
    before: StateScores
    after: StateScores

    @property
    def statuses(self) -> dict[str, str]:
        """Language → status."""
        return {row.language: row.status for row in self.outcome.languages}


@dataclass(frozen=True, slots=True)
class Judge:
    """Scores quantized models on one part of a text set, all with the same resamples."""

    loaded: LoadedModel
    texts: TextSet
    bootstrap: Bootstrap

    @property
    def weights(self) -> Array:
        """The resamples, the whole sample first: `[1 + draws, sentences]`."""
        return Resamples.of(self.bootstrap, len(self.texts)).weights

    def outcome(self, name: str, protected: bool, quantized: QuantizedModel) -> Scored:
        """Score a quantized model against the 16-bit one, language by language.

        Args:
            name: what it was calibrated on.
            protected: whether the plan was applied.
            quantized: the model.
        """
        # One state at a time: all of them at once would hold as many copies of the model.
        states = [block_state(BASELINE, self.loaded), quantized_state(STATE, quantized)]
        scores = score_states(states, self.loaded.tokenizer, self.texts)
        before, after = scores[BASELINE], scores[STATE]
        vocabulary = self.loaded.model.config.get_text_config().vocab_size
        damage = measure_damage(before, after, self.texts, vocabulary=vocabulary, bootstrap=self.bootstrap)
        summary = summarise(before, after, damage, bootstrap=self.bootstrap)
        assert quantized.calibration is not None
        outcome = CalibrationOutcome(
            calibration=name,
            protected=protected,
            summary=quantized.calibration.summary(),
            languages=damage,
            worst_kl=summary.worst_kl,
            mean_kl=summary.mean_kl,
        )
        return Scored(outcome, before, after)

    def series(self, scored: Scored, languages: Sequence[str]) -> Array:
        """Return the largest KL over the languages, under every resample: `[1 + draws]`."""
        return objective_draws(
            scored.before, scored.after, languages, objective="worst", reference=None, weights=self.weights
        )
