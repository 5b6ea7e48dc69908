"""Step 3 of 8, whole: model states on one part of a text set in, a `Measurement` of each out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quant_fairness_plugin.artifacts import Interval, Measurement, Part, Provenance, StateScores, TextSet, Undefined
from quant_fairness_plugin.measure.damage import measure_damage, objective_draws, summarise
from quant_fairness_plugin.measure.intervals import Resamples, interval
from quant_fairness_plugin.measure.scoring import ModelState, score_states

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements by state name, with the per-sentence scores that they were made from."""

    measurements: dict[str, Measurement]
    scores: dict[str, StateScores]
    baseline: str

    def gain(self, before: str, after: str) -> Interval | Undefined:
        """How much lower the worst language's KL (bits per byte) is after than before, sentence by sentence paired.

        Only languages that both states support count; undefined where there is none.
        """
        first, second = self.measurements[before], self.measurements[after]
        alike = zip(first.languages, second.languages, strict=True)
        languages = [a.language for a, b in alike if a.status == "supported" and b.status == "supported"]
        if not languages:
            return Undefined(f"no language is supported and intact under both {before!r} and {after!r}")
        sentences = len(self.scores[self.baseline].languages[languages[0]].tokens)
        arguments = first.provenance.arguments
        weights = Resamples(sentences, arguments["draws"], first.provenance.seed).weights
        old, new = (
            objective_draws(
                self.scores[self.baseline],
                self.scores[name],
                languages,
                objective="worst",
                reference=None,
                weights=weights,
            )
            for name in (before, after)
        )
        difference = np.asarray(old - new)
        return interval(difference)


def measure_states(
    baseline: ModelState,
    states: Sequence[ModelState],
    tokenizer: PreTrainedTokenizerBase,
    texts: TextSet,
    *,
    part: Part,
    vocabulary: int,
    provenance: Callable[[dict[str, Any]], Provenance],
    reference: str | None,
    draws: int = 2000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Damage of model states against the 16-bit model, language by language, all scored in one pass.

    Args:
        baseline: the 16-bit model.
        states: the models to judge; the baseline may be one of them, for its own figures.
        tokenizer: the tokenizer of all.
        texts: the sentences of `part`.
        part: its name, for the record.
        vocabulary: entries of the model's vocabulary.
        provenance: makes the provenance of a result from its resolved arguments.
        reference: language of excess and disparity, or None.
        draws: bootstrap resamples.
        seed: of the resamples.
        progress: called with (batches done, batches in all).

    Raises:
        UnknownLanguageError: the reference is not in the text set.
        ConfigError: fewer than two sentences.
    """
    others = [state for state in states if state.name != baseline.name]
    scores = score_states([baseline, *others], tokenizer, texts, progress=progress)
    before = scores[baseline.name]

    def judge(name: str) -> Measurement:
        after = scores[name]
        damage = measure_damage(
            before, after, texts, reference=reference, vocabulary=vocabulary, draws=draws, seed=seed
        )
        summary = summarise(before, after, damage, draws=draws, seed=seed)
        return Measurement(
            provenance=provenance({"state": name, "part": part, "reference": reference, "draws": draws}),
            state=name,
            part=part,
            reference=reference,
            languages=damage,
            worst_kl=summary.worst_kl,
            mean_kl=summary.mean_kl,
            mean_delta_bpb=summary.mean_delta_bpb,
        )

    return Measured({state.name: judge(state.name) for state in states}, scores, baseline.name)
