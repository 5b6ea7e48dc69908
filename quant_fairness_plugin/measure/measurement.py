"""The whole measurement: model states on one part of a text set in, a `Measurement` of each out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from quant_fairness_plugin.artifacts import (
    Bootstrap,
    Interval,
    Measurement,
    Provenance,
    StateScores,
    Undefined,
)
from quant_fairness_plugin.artifacts.pairs import CheckpointPair
from quant_fairness_plugin.measure.damage import count_sentences, measure_damage, objective_draws, summarise
from quant_fairness_plugin.measure.intervals import Resamples, interval
from quant_fairness_plugin.measure.scoring import ModelState, score_states
from quant_fairness_plugin.texts.parts import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements by state name, with the per-sentence scores that they were made from."""

    measurements: dict[str, Measurement]
    scores: dict[str, StateScores]
    baseline: str
    bootstrap: Bootstrap

    def gain(self, before: str, after: str) -> Interval | Undefined:
        """Return by how much the worst language's KL (bits per byte) is lower after than before, sentences paired.

        Only languages that both states support count; undefined where there is none.
        """
        languages = self._intact(before, after)
        if not languages:
            return Undefined(f"no language is supported and intact under both {before!r} and {after!r}")
        return self._difference(after, before, languages, "worst")

    def described(self, measurements: Mapping[str, Measurement]) -> Measured:
        """Return the same with measurements that say more of how they came about."""
        return replace(self, measurements=self.measurements | dict(measurements))

    def pair(self, first: str, second: str) -> CheckpointPair:
        """Return two states against each other: what the second loses beyond the first, sentences paired."""
        languages = self._intact(first, second)
        undefined = Undefined(f"no language is supported and intact under both {first!r} and {second!r}")
        return CheckpointPair(
            first=self.measurements[first],
            second=self.measurements[second],
            differences={name: self._difference(first, second, [name], "worst") for name in languages},
            worst=self._difference(first, second, languages, "worst") if languages else undefined,
            mean=self._difference(first, second, languages, "mean") if languages else undefined,
        )

    def _intact(self, first: str, second: str) -> list[str]:
        alike = zip(self.measurements[first].languages, self.measurements[second].languages, strict=True)
        return [a.language for a, b in alike if a.status == "supported" and b.status == "supported"]

    def _difference(self, first: str, second: str, languages: Sequence[str], objective: str) -> Interval:
        """Return an objective under the second state minus that under the first; of one language it is its KL."""
        baseline = self.scores[self.baseline]
        weights = Resamples.of(self.bootstrap, count_sentences(baseline)).weights
        old, new = (
            objective_draws(
                baseline, self.scores[name], languages, objective=objective, reference=None, weights=weights
            )
            for name in (first, second)
        )
        return interval(np.asarray(new - old))


def measure_states(
    baseline: ModelState,
    states: Sequence[ModelState],
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    *,
    provenance: Callable[[dict[str, Any]], Provenance],
    bootstrap: Bootstrap,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Return the damage of model states against the 16-bit model, language by language, all scored in one pass.

    Args:
        baseline: the 16-bit model.
        states: the models to judge; the baseline may be one of them, for its figures against itself.
        tokenizer: the tokenizer of all.
        sample: the sentences, and what the record says of them.
        provenance: makes the provenance of a result from its resolved arguments.
        bootstrap: resamples of the sentences, and the reference of excess and disparity.
        progress: called with (batches done, batches in all).

    Raises:
        UnknownLanguageError: the reference is not in the text set.
        ConfigError: fewer than two sentences.
    """
    others = [state for state in states if state.name != baseline.name]
    scores = score_states([baseline, *others], tokenizer, sample.texts, progress=progress)
    with baseline.applied() as model:
        vocabulary = int(model.config.get_text_config().vocab_size)
    before = scores[baseline.name]
    arguments = {"part": sample.part, "reference": bootstrap.reference, "draws": bootstrap.draws}

    def judge(name: str) -> Measurement:
        after = scores[name]
        damage = measure_damage(before, after, sample.texts, vocabulary=vocabulary, bootstrap=bootstrap)
        summary = summarise(before, after, damage, bootstrap=bootstrap)
        return Measurement(
            provenance=provenance({"state": name} | arguments),
            state=name,
            part=sample.part,
            reference=bootstrap.reference,
            languages=damage,
            worst_kl=summary.worst_kl,
            mean_kl=summary.mean_kl,
            mean_delta_bpb=summary.mean_delta_bpb,
            disparity=summary.disparity,
            held_out=not sample.condition,
            condition=sample.condition,
        )

    return Measured({state.name: judge(state.name) for state in states}, scores, baseline.name, bootstrap)
